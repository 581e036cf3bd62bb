"""A simulated CUDA device: tensors that report cuda:0 and hold their data on the CPU.

    with simulated_cuda() as gpu:
        train(TrainOptions(..., device="cuda"))
    assert not gpu.syncs

An operation on tensors of two devices is an error, as on a GPU, and everything that makes the host wait for the device
is recorded with the line that caused it. Autograd is torch's own; autocast is written after it. Any build of torch
will do, and nothing is compiled.

Speed, memory and the order of work on streams are not simulated, and neither are kernels: their numbers are the CPU's.
"""

from tests.simulated_cuda.device import SimulatedGPU, Sync
from tests.simulated_cuda.runtime import simulated_cuda, simulated_mps

__all__ = ["SimulatedGPU", "Sync", "simulated_cuda", "simulated_mps"]
