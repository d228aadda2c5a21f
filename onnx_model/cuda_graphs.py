"""Small batches as captured CUDA graphs of ONNX Runtime: a model of hundreds of small kernels takes
less time to compute a patch than the processor takes to launch them, and a captured graph is one
launch.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime

BATCHES = (1, 8)  # batch sizes that are captured
OPTIONS = {"enable_cuda_graph": "1"}  # of the CUDA provider
PLAIN = "-1"  # the graph's number for runs that are not captured
TOLERANCE = 1e-3  # of a captured run against a plain one: the same kernels on the same numbers


def enabled(session):
    """Whether a session was opened with OPTIONS."""
    options = session.get_provider_options().get("CUDAExecutionProvider", {})
    return options.get("enable_cuda_graph") == "1"


class CapturedRuns:
    """Runs of a session that was opened with OPTIONS: those of BATCHES are captured and replayed on
    buffers of their own, all others go the plain way.

    session  InferenceSession on the GPU number `index`
    shape    of one patch, and `dtype`
    output   name of the output whose runs are captured

    Making one captures the graphs; meanwhile no other thread may use the GPU, which CUDA demands.
    An exception if a graph cannot be captured, or gives other numbers than the plain run.

    ONNX Runtime keeps captured graphs per thread, so all runs go through one thread of this object;
    those who call it may be many."""

    def __init__(self, session, index, shape, dtype, output):
        self.session, self.output, self.buffers = session, output, {}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="cuda-graph")
        self.thread.submit(self.capture, index, shape, dtype).result()

    def __call__(self, patches, output):
        """The output of a contiguous array of patches."""
        return self.thread.submit(self.run, patches, output).result()

    def from_torch(self, patches, output):
        """The output of a torch tensor on the GPU; None if no graph takes it."""
        if output != self.output or len(patches) not in self.buffers:
            return None
        return self.thread.submit(self.replay_torch, patches).result()

    def run_plain(self, binding):
        """Run an IOBinding without a graph."""
        self.thread.submit(self.session.run_with_iobinding, binding, run_options(PLAIN)).result()

    def capture(self, index, shape, dtype):
        (channels,) = [o.shape[1:] for o in self.session.get_outputs() if o.name == self.output]
        generator = np.random.default_rng(0)
        for number, batch in enumerate(BATCHES, start=1):
            patches = generator.standard_normal((batch, *shape), np.float32)
            if dtype == np.uint8:
                patches = generator.integers(0, 256, (batch, *shape), np.uint8)
            expected = self.session.run([self.output], {"patches": patches}, run_options(PLAIN))[0]
            given = onnxruntime.OrtValue.ortvalue_from_numpy(patches, "cuda", index)
            result = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [batch, *channels], np.float32, "cuda", index
            )
            binding = self.session.io_binding()
            binding.bind_ortvalue_input("patches", given)
            binding.bind_ortvalue_output(self.output, result)
            # The first run captures; the others replay.
            self.buffers[batch] = given, result, binding, run_options(str(number))
            self.session.run_with_iobinding(binding, run_options(str(number)))
            actual = self.run(patches, self.output)
            if not np.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE):
                raise ValueError(f"a captured batch of {batch} gives other numbers")

    def run(self, patches, output):
        if output != self.output or len(patches) not in self.buffers:
            return self.session.run([output], {"patches": patches}, run_options(PLAIN))[0]
        given, result, binding, options = self.buffers[len(patches)]
        given.update_inplace(patches)
        self.session.run_with_iobinding(binding, options)
        return result.numpy()

    def replay_torch(self, patches):
        torch = sys.modules["torch"]  # who has such a tensor has loaded it
        given, result, binding, options = self.buffers[len(patches)]
        try:
            view = torch.from_dlpack(given)
        except RuntimeError:  # onnxruntime 1.23
            return None
        view.copy_(patches)
        torch.cuda.current_stream(patches.device).synchronize()  # the graph has another stream
        self.session.run_with_iobinding(binding, options)
        return result.numpy()


def run_options(number):
    """RunOptions that name the captured graph."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", number)
    return options
