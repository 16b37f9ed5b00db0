"""Reversible DeiT: timm's vision transformers of its `deit`, those with a distillation token among them."""

import torch
from timm.models import deit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from petra_zoo.errors import UserError
from petra_zoo.models.petra_vit import PetraVit, resampled
from petra_zoo.models.timm_twins import Family, rebound, register_twins
from petra_zoo.models.transformer_weights import couple_transformer
from petra_zoo.reversible import Unit

__all__ = ["PetraVitDistilled"]


class PetraVitDistilled(PetraVit, VisionTransformerDistilled):
    """A reversible vision transformer with a distillation token and a head for it; see `PetraVit`.

    With `set_distilled_training(True)` it gives the logits of both heads in train mode, as timm's does.
    """

    _pos_embed = rebound(VisionTransformerDistilled._pos_embed, resample_abs_pos_embed=resampled)

    @torch.jit.ignore
    def units(self) -> list[Unit]:
        """See `PetraVit.units`.

        Raises:
            UserError: the network is set to distilled training: who trains units has a loss of one head's logits.
        """
        if self.distilled_training:
            raise UserError(
                "set_distilled_training(True) gives the logits of two heads, and a loss over units takes one tensor: "
                "train the network as a whole, or call set_distilled_training(False)"
            )
        return super().units()


register_twins(
    __name__,
    Family(
        deit,
        "_create_deit",
        {VisionTransformer: PetraVit, VisionTransformerDistilled: PetraVitDistilled},
        couple_transformer,
    ),
)
