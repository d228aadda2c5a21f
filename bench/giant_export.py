"""Export of an encoder of 1.1 billion parameters (random weights, a LoRA run): seconds and peak
memory.

    python bench/giant_export.py [--model h-optimus-0] [--precision fp16] [--patches 64] [--quick]

Memory is the resident memory of export.py and the process that checks the file, together, sampled
ten times a second. Exit status 1 if the peak is over 1.6 times the float32 size of the encoder, or
the result is not complete."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent.parent
# Instead of this folder, whose onnx.py and classify.py would hide the real ones.
sys.path[:1] = [str(HERE), str(HERE / "tests")]

from onnx_models import dataset

import common
import data
import lora
import models
from onnx_model import devices

LIMIT = 1.6  # times the float32 size


def make_run(path, name, images):
    """A LoRA run on random base weights whose adapters are not zero."""
    with torch.device("meta"):
        network = models.build(models.ENCODERS[name])
        lora.add_lora(network)
    size = sum(p.numel() for n, p in network.named_parameters() if "lora_" not in n) * 4
    generator = torch.Generator().manual_seed(0)
    state = {
        f"encoder.{key}": torch.randn(value.shape, generator=generator) * 0.02
        for key, value in lora.lora_state_dict(network).items()
    }
    state["head.weight"] = torch.randn(1, network.embed_dim, generator=generator) * 0.05
    state["head.bias"] = torch.zeros(1)
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors")
    table = data.load_dataset(images)
    data.make_split(table).save(path / "split.json")
    flags = {
        "data": "blobs",
        "model": name,
        "method": "lora",
        "weights": "random",
        "frac": 1.0,
        "fold": 0,
        "fit": "resize",
        "rank": 16,
        "alpha": 16,
        "dropout": 0.1,
        "targets": list(lora.TARGETS),
    }
    common.write_json(
        path / "config.json",
        {
            "flags": flags,
            "data": {"name": "blobs"},
            "encoder": {"name": name, "weights_hash": "random"},
            "source": {"data": str(images), "fit": "resize"},
        },
    )
    common.write_json(path / "metrics.json", {})
    return size


def watch(command):
    """Run a command → (status, output, seconds, peak bytes of the command and its children
    together, peak bytes of the largest of these processes).
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        total = single = 0
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = []
            try:
                for one in [root, *root.children(recursive=True)]:
                    sizes.append(one.memory_info().rss)
            except psutil.Error:
                pass
            total = max(total, sum(sizes))
            single = max(single, *sizes, 0)
            time.sleep(0.1)
        output.seek(0)
        return process.returncode, output.read(), time.perf_counter() - start, total, single


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="h-optimus-0", help="default: h-optimus-0")
    parser.add_argument("--precision", default="fp16", help="default: fp16")
    parser.add_argument("--patches", type=int, default=64, help="to compare on (default: 64)")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    parser.add_argument(
        "--quick", action="store_true", help="vit-b and 8 patches (the limit says little there)"
    )
    args = parser.parse_args()
    if args.quick:
        args.model, args.patches = "vit-b", 8
    folder = Path(args.folder or tempfile.mkdtemp(prefix="giant"))
    try:
        images = dataset(folder / "data")
        size = make_run(folder / "run", args.model, images)
        out = folder / "giant.onnx"
        status, text, seconds, total, single = watch(
            [
                sys.executable,
                str(HERE / "export.py"),
                str(folder / "run"),
                "--precision",
                args.precision,
                "--patches",
                str(args.patches),
                "--out",
                str(out),
                "--device",
                "cpu",
            ]
        )
        print(text)
        if status:
            return 1
        report = json.loads((folder / "giant.parity.json").read_text())["parity"]
        files = sum(p.stat().st_size for p in folder.glob("giant.onnx*"))
        loaded = devices.open_session(out, "cpu")[2]
        difference = max(row["largest"] for row in report["measured"])
        print(
            "| model | precision | float32 size | files | seconds | peak memory | of the float32 "
            "size | largest process | largest Δp |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        print(
            f"| {args.model} | {args.precision} | {size / 1e9:.2f} GB | {files / 1e9:.2f} GB | "
            f"{seconds:.0f} | {total / 1e9:.2f} GB | {total / size:.2f}× | {single / 1e9:.2f} GB | "
            f"{difference:.1e} |"
        )
        print(f"the model loads in {loaded}")
        return int(total > LIMIT * size and not args.quick)
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
