"""Which branches the blocks of known classes are made of, one after the other: for units finer than a block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from functools import partial

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.transformer_parts import attention_in_groups, mlp_in_chunks
from petra_zoo.reversible.compiled import CompileOptions, compile_options
from petra_zoo.reversible.parts import PartedBranch

Branch = Callable[..., Tensor]  # F: (h [B, ...], what all blocks take beside it) -> [B, ...]
Branches = Callable[[nn.Module], Sequence[tuple[str, Branch]]]
Parted = Callable[[nn.Module, str, int], PartedBranch | None]  # of a block, a branch's name, how many parts

ATTENTION = ("norm1", "attn", "ls1", "drop_path1", "gamma_1")  # of a transformer's block, as timm calls its parts
_KNOWN: dict[type[nn.Module], Branches] = {}
_HELD: dict[type[nn.Module], Mapping[str, Sequence[str]]] = {}
_PARTED: dict[type[nn.Module], Parted] = {}


def register_branches(
    block: type[nn.Module],
    branches: Branches,
    held: Mapping[str, Sequence[str]] | None = None,
    parted: Parted | None = None,
) -> None:
    """Makes known what a class of blocks is made of: x -> x + F1(x) -> x + F2(x), and so on.

    Args:
        block: the class, exactly: a subclass may compute something else.
        branches: from a block to the names and functions of its branches, in their order. Each takes h [B, ...] and
            what the container's blocks take beside it, and leaves the addition to its caller.
        held: which of the block's own modules and parameters a branch uses, by its name; one that is left out uses
            all that no other does. So branches of one block may train in two stages. None: each uses all.
        parted: a branch that is evaluated in parts, of h alone; None where it stays whole.
    """
    _KNOWN[block], _HELD[block] = branches, held or {}
    if parted is not None:
        _PARTED[block] = parted


def has_branches(block: nn.Module) -> bool:
    """Whether the branches of a block's class are registered."""
    return type(block) in _KNOWN


def branches_of(block: nn.Module) -> Sequence[tuple[str, Branch]]:
    """The branches of a block.

    Raises:
        UserError: its class is not registered.
    """
    if not has_branches(block):
        known = ", ".join(sorted(kind.__name__ for kind in _KNOWN))
        raise UserError(f"{type(block).__name__} is not known by its branches ({known} are): units='block' needs none")
    return _KNOWN[type(block)](block)


def parted_branch(block: nn.Module, name: str, parts: int) -> PartedBranch | None:
    """A branch of a block in so many parts, where nothing is taken beside h; None: it stays whole."""
    parted = _PARTED.get(type(block))
    return None if parted is None else parted(block, name, parts)


class _Some(MutableMapping[str, nn.Parameter | None]):
    """Some of a module's own parameters: what somebody puts here is put there, too.

    Args:
        of: its dict of them.
        names: which.
    """

    def __init__(self, of: dict[str, nn.Parameter | None], names: Collection[str]) -> None:
        self.of, self.names = of, names

    def __getitem__(self, name: str) -> nn.Parameter | None:
        if name not in self.names:
            raise KeyError(name)
        return self.of[name]

    def __setitem__(self, name: str, p: nn.Parameter | None) -> None:
        self.of[name] = p

    def __delitem__(self, name: str) -> None:
        del self.of[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.of if name in self.names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Part(nn.Module):
    """Some of a block's modules, as they are now, and parameters, which both have."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        vars(self)["block"] = block  # beside the modules, of which it is none
        self.training = block.training
        self._modules = {name: module for name, module in block._modules.items() if name in names}
        vars(self)["_parameters"] = _Some(block._parameters, frozenset(names))

    @property
    def compiled(self) -> CompileOptions | None:
        """As that of the block."""
        return compile_options(vars(self)["block"])


def held_by(block: nn.Module, branch: str) -> nn.Module:
    """What of a block one of its branches uses: a module with those of its parameters; the block, where nobody says.

    Args:
        block: of a registered class.
        branch: its name.
    """
    held = _HELD[type(block)]
    if not held:
        return block
    others = {name for other, names in held.items() if other != branch for name in names}
    rest = [name for name in (*block._modules, *block._parameters) if name not in others]
    return _Part(block, held.get(branch, rest))


def _attention(block: Block, h: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    attended: Tensor = block.attn(block.norm1(h), attn_mask=attn_mask, is_causal=is_causal)
    return block.drop_path1(block.ls1(attended))


def _mlp(block: Block, h: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return block.drop_path2(block.ls2(block.mlp(block.norm2(h))))


def _of_transformer(block: nn.Module) -> Sequence[tuple[str, Branch]]:
    assert isinstance(block, Block)
    return ("attn", partial(_attention, block)), ("mlp", partial(_mlp, block))


def _parted_transformer(block: nn.Module, name: str, parts: int) -> PartedBranch | None:
    assert isinstance(block, Block)
    return attention_in_groups(block, parts) if name == "attn" else mlp_in_chunks(block, parts)


register_branches(Block, _of_transformer, {"attn": ATTENTION}, _parted_transformer)
