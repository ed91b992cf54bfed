"""PyTorch's side on the GPU: the peer of `torch_side`, eager or compiled; cuBLAS's products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_job import Job, Row, batches_of, parameters_of, rate
from benchmarks.gpu_ours import MATRICES, REPEATS, ROWS
from benchmarks.sizes import benchmark_config
from benchmarks.torch_side import Attention, Decoder, TorchSide, load, rotate

VARIANTS = (
    *(("mhmoe", "float32"), ("mhmoe", "tf32")),
    *(("mhmoe-bitnet", "float32"), ("mhmoe-bitnet", "tf32")),
)
PRECISION = {"float32": "highest", "tf32": "high"}


def synchronise(job: Job) -> None:
    if job.torch_device == "cuda":
        torch.cuda.synchronize()


# ---- whole models ----------------------------------------------------------------------------


def attend(
    attention: Attention, x: Tensor, kv: Tensor, position: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """One new token of each sequence; kv [2, B, A, S, C] gets its key and value at `position`."""
    B, _, D = x.shape
    heads = attention.heads
    q, k, v = attention.project(x).view(B, 1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    cos, sin = cos.index_select(0, position), sin.index_select(0, position)
    kv.index_copy_(3, position, torch.stack((rotate(k, cos, sin), v)))
    seen = torch.arange(kv.shape[3], device=x.device) <= position
    y = F.scaled_dot_product_attention(rotate(q, cos, sin), kv[0], kv[1], attn_mask=seen[None])
    return attention.o(attention.norm(y.transpose(1, 2).reshape(B, 1, D)))


def decode(model: Decoder, caches: list[Tensor], token: Tensor, position: Tensor) -> Tensor:
    """The logits after one more token of each sequence."""
    x = model.embedding(token)
    for block, kv in zip(model.blocks, caches, strict=True):
        x = x + attend(block.attention, block.attention_norm(x), kv, position, model.cos, model.sin)
        y = block.mlp(block.mlp_norm(x))
        x = x + (y[0] if isinstance(y, tuple) else y)
    return model.output(model.norm(x))[:, 0]


def whole_models(job: Job, size: str, side: str) -> Iterator[Row]:
    """Training, evaluation and decoding of each of `VARIANTS`; side: torch or torch-compile."""
    compiled: Callable[[Any], Any] = torch.compile if side == "torch-compile" else lambda module: module
    for name, matmul in VARIANTS:
        torch.set_float32_matmul_precision(PRECISION[matmul])
        torch._dynamo.reset()
        config = benchmark_config(size, name)
        parameters = parameters_of(job, size, name)
        model = Decoder(config)
        load(model, {key: torch.from_numpy(array) for key, array in parameters.tensors.items()})
        del parameters
        model = model.to(job.torch_device)
        if job.torch_device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        tokens = torch.from_numpy(batches_of(size, config)).to(job.torch_device)
        peer = TorchSide(model, compiled(model), tokens)
        per_step = tokens[0, :, 1:].numel()
        head = {"side": side, "size": size, "model": name, "matmul": matmul}
        wait = partial(synchronise, job)
        started = time.perf_counter()
        nll, _ = peer.loss()
        seconds = rate(peer.train_step, wait, job.seconds)
        yield {
            **head,
            "work": "train",
            "nll": nll,
            "ms": seconds * 1e3,
            "tokens_per_s": per_step / seconds,
            "device_mb": torch.cuda.max_memory_allocated() / 1e6 if tokens.is_cuda else 0,
            "first_s": time.perf_counter() - started - job.seconds,
        }
        seconds = rate(peer.evaluate_batch, wait, job.seconds / 2)
        yield {**head, "work": "evaluate", "ms": seconds * 1e3, "tokens_per_s": per_step / seconds}
        for sequences in (1, 16):
            seconds = rate(_decoding(job, model, compiled(decode), sequences), wait, job.seconds / 2)
            yield {
                **head,
                "work": f"decode {sequences}",
                "ms": seconds * 1e3,
                "tokens_per_s": sequences / seconds,
            }
        del model, peer


def _decoding(
    job: Job, model: Decoder, step: Callable[..., Tensor], sequences: int
) -> Callable[[], object]:
    """What decodes one token of each sequence and takes the logits to the host, as our side does."""
    attention = model.blocks[0].attention
    width = model.embedding.embedding_dim
    positions = min(job.decoded, len(model.cos) - 1)
    shape = (2, sequences, attention.heads, positions, width // attention.heads)
    caches = [torch.zeros(shape, device=job.torch_device) for _ in model.blocks]
    token = torch.zeros((sequences, 1), dtype=torch.long, device=job.torch_device)
    done = 0

    def call() -> object:
        nonlocal done
        position = torch.tensor([done % positions], device=job.torch_device)
        done += 1
        with torch.no_grad():
            return step(model, caches, token, position).cpu()

    return call


# ---- products --------------------------------------------------------------------------------


def device_seconds(job: Job, call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of a call by the device's clock, of `repeats` in a row, recorded as a graph."""
    for _ in range(3):
        call()
    if job.torch_device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    first.record()
    graph.replay()
    last.record()
    torch.cuda.synchronize()
    return max(first.elapsed_time(last) / 1e3 / repeats, 1e-9)


def products(
    job: Job, matrices: tuple[tuple[int, int], ...] = MATRICES, rows: tuple[int, ...] = ROWS
) -> Iterator[Row]:
    """cuBLAS's products in float32, tf32, float16 and of 8-bit integers."""
    rng = np.random.default_rng(0)
    for outputs, inputs in matrices:
        w = torch.from_numpy(rng.standard_normal((outputs, inputs), np.float32)).to(job.torch_device)
        for N in rows:
            x = torch.from_numpy(rng.standard_normal((N, inputs), np.float32)).to(job.torch_device)
            half_x, half_w = x.half(), w.half().T
            # cuBLAS takes more than 16 rows of integers: fewer are padded.
            whole_x = torch.zeros((max(N, 32), inputs), dtype=torch.int8, device=job.torch_device)
            whole_w = w.sign().to(torch.int8).T
            kinds: dict[str, Callable[[], object]] = {
                "float32": partial(torch.matmul, x, w.T),
                "tf32": partial(torch.matmul, x, w.T),
                "float16": partial(torch.matmul, half_x, half_w),
                "int8": partial(torch._int_mm, whole_x, whole_w),
            }
            for kind, call in kinds.items():
                torch.set_float32_matmul_precision(PRECISION.get(kind, "highest"))
                row: Row = {
                    "side": "cublas",
                    "rows": N,
                    "outputs": outputs,
                    "inputs": inputs,
                    "kind": kind,
                }
                try:
                    seconds = device_seconds(job, call)
                except RuntimeError as error:
                    yield {**row, "error": str(error).partition("\n")[0]}
                    continue
                yield {
                    **row,
                    "us": seconds * 1e6,
                    "tops": 2 * N * outputs * inputs / seconds / 1e12,
                }
