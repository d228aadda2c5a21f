"""Checks of the dropout kernels that run on any device: on CPU tensors under Triton's interpreter
(test_dropout.py starts a process for it), and on GPUs.

Each takes a device and raises AssertionError.
"""

import contextlib

import torch
from torch import nn

import lora
from encoders import dropout

HASH = (dropout.MIX1, dropout.MIX2, dropout.WEYL)
KEYS = [-5, 2**63 - 1, 0, -(2**63), 1234567890123]
# The first element's number, and the shares that keep it just so, and just not.
FIRST = dropout.splitmix(torch.tensor(KEYS) + dropout.WEYL).view(torch.int16)[0].item() + 32768
EDGES = [FIRST / 65536, (FIRST + 1) / 65536]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CASES = [  # elements of a sample (a program of the kernels has 1,024), p, type
    *((7, p, torch.float32) for p in (1e-5, 0.1, 0.5, 0.9999, *EDGES)),
    *((size, 0.5, torch.float32) for size in (1, 3, 4, 1023, 1024, 2051)),
    *((1025, 0.1, dtype) for dtype in DTYPES),
]


def kernels():
    from encoders import dropout_kernels  # imports triton

    return dropout_kernels


@contextlib.contextmanager
def computed_by(module):
    """LoRA's dropout by Triton's kernels (`module`) whatever the device, or by torch (None)."""
    kernels_for, keep_mask = dropout.kernels_for, dropout.keep_mask
    dropout.kernels_for = lambda x: module
    if module is not None:
        dropout.keep_mask = None  # calling it would fail
    try:
        yield
    finally:
        dropout.kernels_for, dropout.keep_mask = kernels_for, keep_mask


def values(shape, dtype, device):
    """Random whole numbers from 1 to 60: their sums are exact in every type.

    Triton's interpreter truncates where a GPU rounds to bf16."""
    return torch.randint(1, 61, shape, device=device).to(dtype)


def masks_are_the_same(device, mixers=HASH, shift=0):
    """Whether the kernel's masks are keep_mask's. shift: of first_kept."""
    key = torch.tensor(KEYS)
    for size, p, dtype in CASES:
        x = values((len(KEYS), size), dtype, device)
        wanted = x * dropout.keep_mask(key, size, p).to(device)
        first = dropout.first_kept(p) + shift
        got = kernels().drop(x, key.to(device), size, first, mixers)
        if got.dtype != dtype or not torch.equal(got, wanted):
            return False
    return True


def check_masks(device):
    assert masks_are_the_same(device)


def check_that_other_masks_are_found(device):
    for place in range(3):
        mixers = [constant + 2 * (i == place) for i, constant in enumerate(HASH)]
        assert not masks_are_the_same(device, mixers), place
    for shift in (-1, 1):
        assert not masks_are_the_same(device, shift=shift), shift


def check_sums(device):
    key = torch.tensor(KEYS, device=device)
    for size, p, dtype in CASES:
        total, x = (values((len(KEYS), size), dtype, device) for _ in range(2))
        if torch.device(device).type == "cuda":
            total, x = torch.randn_like(total), torch.randn_like(x)
        wanted = total.double() + x.double() * dropout.keep_mask(key, size, p)
        with computed_by(kernels()):
            got = dropout.add_kept(total, x, key, size, p)
        assert got.data_ptr() == total.data_ptr()
        assert torch.equal(got, wanted.to(dtype)), (size, p, dtype)


def check_views(device):
    """Inputs that are not contiguous, keys that are a row of a larger buffer, nothing at all."""
    buffer = torch.arange(-21, 14, device=device).view(7, 5) * 10**17  # [layers, B]
    key = buffer[3]
    x = values((5, 33, 12), torch.float32, device)
    for view in (x, x[:, :1], x[:, ::2], x[:, :, 3:10], x.transpose(1, 2), x[..., :0]):
        size = view.shape[1:].numel()
        wanted = view * dropout.keep_mask(key, size, 0.3).view(view.shape)
        total = values(view.shape, torch.float32, device)
        with computed_by(kernels()):
            got, keep = dropout.drop(view, key, size, 0.3)
            added = dropout.add_kept(total.clone(), view, key, size, 0.3)
        assert keep is None and torch.equal(got, wanted)
        assert torch.equal(added, total + wanted)
    assert torch.equal(buffer, torch.arange(-21, 14, device=device).view(7, 5) * 10**17)


def check_layers(device):
    """LoRA's and DoRA's output and all gradients are those of plain torch, bit by bit."""
    dtypes = [torch.float32]
    dtypes += [torch.bfloat16] if torch.device(device).type == "cuda" else [torch.float64]
    for dtype in dtypes:
        for dora in (False, True):
            torch.manual_seed(0)
            base = nn.Linear(33, 20).to(device, dtype).requires_grad_(False)
            layer = lora.LoRALinear(base, 4, 6, 0.3, 0, dora=dora).train()
            nn.init.normal_(layer.lora_B)
            layer.key = torch.arange(-9, 9, device=device).view(6, 3)[2]
            tokens = torch.randn(3, 7, 33, device=device, dtype=dtype)
            for x in (tokens, tokens[:, :1], tokens[:, 1::2]):
                results = []
                for module in (None, kernels()):
                    given = x.detach().requires_grad_()
                    with computed_by(module):
                        y = layer(given)
                        y.float().square().sum().backward()
                    found = [
                        y,
                        given.grad,
                        *(p.grad for p in layer.parameters() if p.requires_grad),
                    ]
                    assert len(found) == 4 + dora
                    assert all(tensor.abs().sum() > 0 for tensor in found)
                    results.append(found)
                    layer.zero_grad()
                for plain, kernel in zip(*results):
                    assert torch.equal(plain, kernel), (dtype, dora, x.shape)


def run(device):
    check_masks(device)
    check_that_other_masks_are_found(device)
    check_sums(device)
    check_views(device)
    check_layers(device)


# ---------------------------------------------------------------- on GPUs alone


def check_that_a_gpu_uses_the_kernels(device):
    x, key = torch.ones(3, 40, device=device), torch.arange(3, device=device)
    assert dropout.kernels_for(x) is kernels()
    keep = dropout.keep_mask(key.cpu(), 40, 0.5)
    assert torch.equal(dropout.drop(x, key, 40, 0.5)[0].cpu(), keep.float())


def check_graph(device):
    """In a CUDA graph the masks follow the keys in the static buffer."""
    size = 4099
    buffer = torch.zeros(2, 3, dtype=torch.int64, device=device)
    x, total = torch.ones(3, size, device=device), torch.zeros(3, size, device=device)

    def step():
        return dropout.drop(x, buffer[0], size, 0.1)[0], dropout.add_kept(
            total, x, buffer[1], size, 0.5
        )

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dropped, added = step()
    for number in range(1, 4):
        keys = torch.tensor([[number, -number, 7], [8, 2**60 + number, -(2**63)]])
        buffer.copy_(keys)
        total.zero_()
        graph.replay()
        assert torch.equal(dropped.cpu(), dropout.keep_mask(keys[0], size, 0.1).float())
        assert torch.equal(added.cpu(), dropout.keep_mask(keys[1], size, 0.5).float())


def check_beyond_32_bits(device):
    """The last of three samples of 2^30 elements starts at 2^31; 18 GiB of memory."""
    size = 2**30
    key = torch.tensor([1, 2, 3], device=device)
    x = torch.ones(3, size, dtype=torch.bfloat16, device=device)
    got, _ = dropout.drop(x, key, size, 0.5)
    alone, _ = dropout.drop(x[2:].clone(), key[2:], size, 0.5)
    assert torch.equal(got[2:], alone)
    assert torch.equal(got[2:, :999].bool().cpu(), dropout.keep_mask(key[2:].cpu(), 999, 0.5))
    dropout.add_kept(x, x, key, size, 0.5)  # ones and twos
    assert torch.equal(x[2:] - 1, alone)


def run_on_gpu(device):
    run(device)
    check_that_a_gpu_uses_the_kernels(device)
    check_graph(device)
    if torch.cuda.mem_get_info(device)[0] > 20 * 2**30:
        check_beyond_32_bits(device)
