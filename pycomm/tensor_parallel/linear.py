"""Linear layers whose weight is split: by its rows (outputs) or by its columns (inputs).

One of each make a pair that needs one sum forward and one backward, with anything element-wise in
between: ``row(gelu(column(x)))``, or attention over the rank's own heads.

::

    whole x --> ColumnParallelLinear --> split --> RowParallelLinear --> whole
                 x A_r                              y_r B_r, summed over ranks r

Source: Shoeybi et al., Megatron-LM (2019).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycomm._core import Group
from pycomm.arguments import refuse
from pycomm.runtime import group_of
from pycomm.shares import SplitModule, refuse_fewer
from pycomm.tensor_parallel.regions import (
    copy_to_region,
    gather_from_region,
    gather_from_sequence,
    reduce_from_region,
    reduce_scatter_to_sequence,
    scatter_to_region,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class _SplitLinear(SplitModule):
    """What both kinds have in common. Options are each kind's own."""

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        sequence_dim: int | None,
        group: Group | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(group_of(group, type(self).__name__))
        self.in_features, self.out_features = in_features, out_features
        self.sequence_dim = sequence_dim
        self._check()
        self._take(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))

    @classmethod
    def from_module(cls, linear: nn.Linear, *, group: Group | None = None, **options: Any) -> Self:
        """The share of ``linear``, the same on every rank; ``options`` as for the class."""
        made = cls(
            *(linear.in_features, linear.out_features, linear.bias is not None),
            **{"group": group, "device": "meta", "dtype": linear.weight.dtype, **options},
        )
        made._take(linear)
        return made

    def to_module(self) -> nn.Linear:
        """The whole layer, on every rank. Collective."""
        bias = self.whole("bias")
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.register_parameter("weight", self.whole("weight"))
        linear.register_parameter("bias", bias)
        return linear

    def _check(self) -> None:
        """Refuse what cannot be split."""
        raise NotImplementedError

    def _take(self, whole: nn.Linear) -> None:
        """Keep this rank's share of a layer."""
        raise NotImplementedError


class ColumnParallelLinear(_SplitLinear):
    """``nn.Linear`` of which each rank computes its share of the output features.

    The name is the literature's, which writes ``x A``: its columns are the rows of ``weight``.

    Args:
        in_features, out_features, bias, device, dtype: of the whole layer, as for ``nn.Linear``.
            The ranks' shares of the output differ by at most one feature.
        gather_output: return the whole output instead of this rank's share.
        sequence_dim: the input is split along this dimension of it (see ``SequenceLayerNorm``)
            instead of whole. The pieces are put together for the product and not kept: backward
            does so again.
        group: the ranks that share the layer, the world if None.

    Weights are those of ``nn.Linear`` drawn from the same random state, of which each rank keeps
    its share; so let the ranks of the group draw the same numbers (``torch.manual_seed``).

    Input: shape ``(*, in_features)``, whole. Output: ``(*, share of out_features)``, split.

    Raises:
        InvalidArgumentError: fewer output features than ranks.

    Cost: nothing forward; backward one all-reduce of the input's gradient. With ``sequence_dim``
    all-gather forward, all-gather and reduce-scatter backward.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gather_output: bool = False,
        sequence_dim: int | None = None,
        group: Group | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, sequence_dim, group, device, dtype)
        self.gather_output = gather_output

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.sequence_dim is not None:
            y = _gathered_linear(x, self.weight, self.bias, self.sequence_dim, self.group)
        else:
            y = functional.linear(copy_to_region(x, group=self.group), self.weight, self.bias)
        if self.gather_output:
            y = gather_from_region(y, -1, length=self.out_features, group=self.group)
        return y

    def extra_repr(self) -> str:
        """As ``nn.Linear``."""
        return (
            f"in_features={self.in_features}, out_features={self.weight.shape[0]} of "
            f"{self.out_features}, bias={self.bias is not None}"
        )

    def _check(self) -> None:
        refuse_fewer(type(self).__name__, "out_features", self.out_features, self.group)

    def _take(self, whole: nn.Linear) -> None:
        self.take_share("weight", whole.weight, 0)
        self.take_share("bias", whole.bias, 0)


class RowParallelLinear(_SplitLinear):
    """``nn.Linear`` of which each rank multiplies its share of the input features.

    The name is the literature's, which writes ``x A``: its rows are the columns of ``weight``.

    Args:
        in_features, out_features, bias, device, dtype: of the whole layer, as for ``nn.Linear``.
            The ranks' shares of the input differ by at most one feature.
        split_input: whether the input is this rank's share, as a ``ColumnParallelLinear`` returns
            it, or whole.
        sequence_dim: return the output split along this dimension of it instead of whole.
        group: the ranks that share the layer, the world if None.

    Weights as for ``ColumnParallelLinear``. The bias is whole on every rank.

    Input: shape ``(*, share of in_features)``, split. Output: ``(*, out_features)``, whole.

    Raises:
        InvalidArgumentError: fewer input features than ranks; in ``forward``, an input that is not
            this rank's share.

    Cost: one all-reduce of the output forward, nothing backward. With ``sequence_dim``
    reduce-scatter forward and all-gather backward.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        split_input: bool = True,
        sequence_dim: int | None = None,
        group: Group | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, sequence_dim, group, device, dtype)
        self.split_input = split_input

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if not self.split_input:
            x = scatter_to_region(x, -1, group=self.group)
        if x.shape[-1] != self.weight.shape[1]:
            refuse(
                "RowParallelLinear",
                self.group,
                f"the input has {x.shape[-1]} features, and this rank's share of "
                f"{self.in_features} is {self.weight.shape[1]}.\n  Pass what a "
                "ColumnParallelLinear of the same group returns, or build the layer with "
                "split_input=False.",
            )
        partial = functional.linear(x, self.weight)
        bias: Tensor | None = self.bias
        if self.sequence_dim is None:
            y = reduce_from_region(partial, group=self.group)
        else:
            y = reduce_scatter_to_sequence(partial, self.sequence_dim, group=self.group)
            if bias is not None:  # each part of the sequence has a part in its gradient
                bias = copy_to_region(bias, group=self.group)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """As ``nn.Linear``."""
        return (
            f"in_features={self.weight.shape[1]} of {self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )

    def _check(self) -> None:
        refuse_fewer(type(self).__name__, "in_features", self.in_features, self.group)

    def _take(self, whole: nn.Linear) -> None:
        self.take_share("weight", whole.weight, 1)
        bias: Tensor | None = whole.bias
        self.register_parameter(
            "bias",
            bias if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad),
        )


def _gathered_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, group: Group
) -> Tensor:
    """``linear`` of all ranks' ``x``, put together again in backward instead of kept until then."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))  # before it travels
    whole = gather_from_sequence(x, dim, group=group)
    if whole is x:  # alone
        return functional.linear(x, weight, bias)
    own, version = x.detach(), x._version
    address, count = whole.data_ptr(), whole.numel()

    def pack(saved: Tensor) -> tuple[Tensor | None, Any]:
        if saved.data_ptr() == address and saved.numel() == count:
            return None, saved.shape
        return saved, saved._version

    def unpack(packed: tuple[Tensor | None, Any]) -> Tensor:
        saved, known = packed
        if saved is None:
            _check_unchanged("the input", own, version)
            return gather_from_sequence(own, dim, group=group).view(known)
        _check_unchanged("a weight", saved, known)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return functional.linear(whole, weight, bias)


def _check_unchanged(what: str, t: Tensor, version: int) -> None:
    """As torch checks what no hook of ours has packed."""
    if t._version != version:
        raise RuntimeError(
            f"{what} of ColumnParallelLinear, of shape {tuple(t.shape)}, was changed in place "
            "between forward and backward.\n  Change a copy, or change it after backward()."
        )
