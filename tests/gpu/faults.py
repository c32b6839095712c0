"""Ranks of which one misbehaves on purpose: what the others say. Started by scripts/gpu_check.py.

torchrun --standalone --nproc-per-node 2 tests/gpu/faults.py late|killed|shared
"""

import os
import signal
import sys
import time

import torch
from mode import ON_GPUS

import pycomm


def main(fault: str) -> None:
    pycomm.init(timeout_s=4)
    # torchrun ends the others as soon as one rank has died: they are to speak first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    last = pycomm.rank() == pycomm.size() - 1
    gpu = 0 if fault == "shared" else pycomm.local_rank()
    device = torch.device("cuda", gpu) if ON_GPUS else torch.device("cpu")
    if ON_GPUS:
        torch.cuda.set_device(device)
    t = torch.ones(1000, device=device)
    expected = {
        "late": pycomm.CommTimeoutError,
        "killed": pycomm.PeerLostError,
        "shared": pycomm.InvalidArgumentError,
    }[fault]
    begun = time.monotonic()
    try:
        if fault != "shared":
            pycomm.all_reduce(t)
        if fault == "late" and last:
            time.sleep(8)
        if fault == "killed" and last:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(2):
            pycomm.all_reduce(t)
            if ON_GPUS:
                torch.cuda.synchronize()
    except expected as error:
        print(f"rank {pycomm.rank()}, {time.monotonic() - begun:.1f} s, as expected: "
              f"{type(error).__name__}: {error}", flush=True)  # fmt: skip
        if fault == "shared" and "both use GPU" in str(error):
            # The group goes on for CPU tensors.
            assert pycomm.all_reduce(torch.ones(1)).item() == pycomm.size()
            print(f"rank {pycomm.rank()}, as expected: both use GPU 0, and CPU tensors go on")


if __name__ == "__main__":
    main(sys.argv[1])
