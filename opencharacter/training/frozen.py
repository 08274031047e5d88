"""Matrix products with frozen weights, in bf16 or in FP8, fused with the LoRA update beside them.

LoRA leaves the base weights unchanged, so they can be quantized once and multiplied on the GPU's
FP8 tensor cores, which are twice as fast as the bf16 ones. Adapters, norms, attention and the
language model head stay in bf16. A product uses one scale per row of each operand (amax / 448, the
largest e4m3 value):

    x ~ s_x * q_x,  w ~ s_w * q_w,  x @ w.T ~ (q_x @ q_w.T) * s_x * s_w.T

The rows of ``w`` are its output channels in the forward pass and its input channels in the
backward pass (``grad @ w``), so two quantized copies are kept; together they take the memory of one
bf16 copy. The e4m3 format is that of Micikevicius et al., "FP8 formats for deep learning", arXiv
2209.05433.

A LoRA layer as separate operations reads and writes its output three more times: to scale the
update, to add it, and to add both gradients of the input. `LoraProduct` does these inside the
matrix products.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch

from opencharacter.errors import UserError

E4M3_MAX = 448.0
ALIGNMENT = 16
"""FP8 products need dimensions that are multiples of this."""
SMALLEST_AMAX = 1e-12
"""Keeps the scale of a row of zeros finite."""


class Quantized(NamedTuple):
    """A matrix in FP8, quantized row by row.

    Args:
        values: float8_e4m3fn (rows, columns).
        scales: float32 (rows, 1); ``values * scales`` approximates the matrix.
    """

    values: torch.Tensor
    scales: torch.Tensor


def quantize_rows(matrix: torch.Tensor) -> Quantized:
    """Quantize a (rows, columns) matrix with one scale per row."""
    if matrix.is_cuda and matrix.dtype == torch.bfloat16:
        return _quantize_rows_on_gpu(matrix)
    amax = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST_AMAX)
    scales = amax / E4M3_MAX
    values = (matrix.float() / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Quantized(values, scales)


@cache
def _row_kernel() -> Any:
    """The Triton kernel of `quantize_rows`: one program reads a row once."""
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def kernel(matrix, values, scales, columns, largest, smallest, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < columns
        x = tl.load(matrix + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(x), axis=0), smallest) / largest
        q = tl.minimum(tl.maximum(x / scale, -largest), largest)
        tl.store(values + row * columns + at, q.to(tl.float8e4nv), mask=inside)
        tl.store(scales + row, scale)

    return kernel


def _quantize_rows_on_gpu(matrix: torch.Tensor) -> Quantized:
    matrix = matrix.contiguous()
    rows, columns = matrix.shape
    values = torch.empty_like(matrix, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, 1, device=matrix.device, dtype=torch.float32)
    block = 1 << (columns - 1).bit_length()
    warps = min(16, max(4, block // 512))
    with torch.cuda.device(matrix.device):
        _row_kernel()[(rows,)](
            matrix,
            values,
            scales,
            columns,
            E4M3_MAX,
            SMALLEST_AMAX,
            BLOCK=block,
            num_warps=warps,
        )
    return Quantized(values, scales)


def multiply(left: Quantized, right: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """``left @ right.T``: (m, k) times the transpose of (n, k), returned as `dtype` (m, n)."""
    if not left.values.is_cuda:  # the same rounding, without FP8 hardware
        a, b = (m.values.float() * m.scales for m in (left, right))
        return (a @ b.T).to(dtype)
    return torch._scaled_mm(
        left.values,
        right.values.T,
        scale_a=left.scales,
        scale_b=right.scales.T,
        out_dtype=dtype,
        use_fast_accum=True,
    )


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the precision of a product: autocast's where it is enabled, else the weight's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class FrozenWeight(Protocol):
    """A frozen (n, k) weight as `LoraProduct` uses it; products have the dtype of their input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ w.T``: (m, k) -> (m, n)."""
        ...

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """``grad @ w``: (m, n) -> (m, k)."""
        ...


class PlainWeight:
    """A frozen weight in its own precision."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T.to(x.dtype)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        return grad @ self.weight.to(grad.dtype)


class Fp8Weight:
    """A frozen weight in FP8, quantized once for each direction.

    Args:
        weight: (n, k).
        inputs: shared by layers that read the same tensor, such as the query, key and value
            projections of a block, so that it is quantized once.
    """

    def __init__(self, weight: torch.Tensor, inputs: InputCache):
        self.by_output = quantize_rows(weight.detach())
        self.by_input = quantize_rows(weight.detach().T.contiguous())
        self.inputs = inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(self.inputs.quantized(x), self.by_output, x.dtype)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        return multiply(quantize_rows(grad), self.by_input, grad.dtype)


class InputCache:
    """The last input that was quantized."""

    def __init__(self):
        self.base: torch.Tensor | None = None
        self.state: tuple[Any, ...] = ()
        self.value: Quantized | None = None

    def quantized(self, x: torch.Tensor) -> Quantized:
        """`quantize_rows`, or the value of the last call for the same memory, unchanged since."""
        if x.is_inference():  # such a tensor does not record whether it has changed
            return quantize_rows(x)
        base = x._base if x._base is not None else x
        state = (base._version, x.data_ptr(), x.shape, x.stride())
        if self.value is None or self.base is not base or self.state != state:
            self.base, self.state, self.value = base, state, quantize_rows(x)
        return self.value


class LoraProduct(torch.autograd.Function):
    """``x @ w.T + scaling * (x @ a.T) @ b.T`` with gradients for x, a and b.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: FrozenWeight,
        dtype: torch.dtype,
        scaling: float,
    ) -> torch.Tensor:
        """Compute the layer's output.

        Args:
            ctx: keeps what the backward pass needs.
            x: (..., k).
            a: (r, k).
            b: (n, r).
            weight: (n, k), frozen.
            dtype: precision of the products.
            scaling: alpha / r, or alpha / sqrt(r).

        Returns:
            (..., n), in that precision.
        """
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        low_a, low_b = a.to(dtype), b.to(dtype)
        hidden = flat @ low_a.T
        product = weight.forward(flat).addmm_(hidden, low_b.T, alpha=scaling)
        ctx.save_for_backward(flat, hidden, low_a, low_b)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        ctx.dtypes = x.dtype, a.dtype, b.dtype
        return product.reshape(*x.shape[:-1], product.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradients of x, a and b."""
        flat, hidden, a, b = ctx.saved_tensors
        grad = grads[0].to(a.dtype).reshape(-1, b.shape[0])
        grad_hidden = grad @ (b * ctx.scaling)
        grad_b = (grad.T @ hidden) * ctx.scaling
        grad_a = grad_hidden.T @ flat
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.weight.backward(grad).addmm_(grad_hidden, a)
            grad_x = grad_x.reshape(ctx.shape).to(ctx.dtypes[0])
        return grad_x, grad_a.to(ctx.dtypes[1]), grad_b.to(ctx.dtypes[2]), None, None, None


class FusedLora:
    """The forward pass of a PEFT LoRA layer as one `LoraProduct`.

    Args:
        layer: a `peft.tuners.lora.Linear` with one adapter, without dropout.
        weight: the frozen weight of the layer.
    """

    def __init__(self, layer: Any, weight: FrozenWeight):
        (name,) = layer.active_adapters
        self.a, self.b = layer.lora_A[name], layer.lora_B[name]
        self.scaling, self.base, self.weight = layer.scaling[name], layer.base_layer, weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dtype, (a, b) = compute_dtype(x, self.base.weight), (self.a.weight, self.b.weight)
        product: Any = LoraProduct.apply(x, a, b, self.weight, dtype, self.scaling)
        return product if self.base.bias is None else product + self.base.bias.to(dtype)


class QuantizedLinear:
    """The forward pass of a linear layer with an FP8 weight, without gradients.

    Args:
        layer: the layer.
        inputs: as in `Fp8Weight`.
    """

    def __init__(self, layer: torch.nn.Linear, inputs: InputCache):
        self.layer, self.weight = layer, Fp8Weight(layer.weight, inputs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(x, self.layer.weight)
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        product = self.weight.forward(flat).reshape(*x.shape[:-1], -1)
        return product if self.layer.bias is None else product + self.layer.bias.to(dtype)


def fuse_lora(
    model: torch.nn.Module, fp8: bool = False, keep_in: torch.dtype | None = None
) -> None:
    """Run the LoRA layers of a PEFT model as `LoraProduct`s, in place.

    With FP8 the bf16 weights are released, so the base model can no longer be saved.

    Args:
        model: a PEFT model on the device on which it will run.
        fp8: whether the frozen weights are quantized.
        keep_in: precision in which frozen weights that are not quantized are kept; None for theirs.

    Raises:
        UserError: if this GPU or the shape of a layer does not support FP8.
    """
    inputs: dict[str, InputCache] = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A") or not isinstance(layer.base_layer, torch.nn.Linear):
            continue
        base = layer.base_layer
        if not fp8:
            base.weight.data = base.weight.data.to(keep_in or base.weight.dtype)
            layer.forward = FusedLora(layer, PlainWeight(base.weight))
            continue
        check_fp8(name, base.weight)
        shared = inputs.setdefault(name.rpartition(".")[0], InputCache())
        layer.forward = FusedLora(layer, Fp8Weight(base.weight, shared))
        base.weight.data = base.weight.data.new_empty(0)


def quantize_linear(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Run linear layers of a model that is not trained with FP8 weights, in place.

    Args:
        model: on the device on which it will run.
        names: of the layers, as `model.named_modules` gives them.

    Raises:
        UserError: as `fuse_lora`.
    """
    inputs: dict[str, InputCache] = {}
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear), name
        check_fp8(name, layer.weight)
        shared = inputs.setdefault(name.rpartition(".")[0], InputCache())
        layer.forward = QuantizedLinear(layer, shared)
        layer.weight.data = layer.weight.data.new_empty(0)


def check_fp8(name: str, weight: torch.Tensor) -> None:
    """Refuse a GPU or a layer that FP8 products do not support.

    Args:
        name: of the layer.
        weight: of the layer, on its device.

    Raises:
        UserError: naming the GPU or the layer.
    """
    remedy = "set frozen_weights: bf16"
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
        raise UserError(
            "frozen_weights: fp8 needs a GPU with FP8 tensor cores (compute capability 8.9 or "
            f"newer), but this is {torch.cuda.get_device_name(weight.device)}; {remedy}"
        )
    if any(size % ALIGNMENT for size in weight.shape):
        raise UserError(
            f"frozen_weights: fp8 needs layer sizes that are multiples of {ALIGNMENT}, but {name} "
            f"is {tuple(weight.shape)}; {remedy}"
        )
