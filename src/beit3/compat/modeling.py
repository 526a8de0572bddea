"""Upstream's models of the five fine-tuning tasks (`modeling_finetune.py`) over our network."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.compat.network import BEiT3Wrapper, State
from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.config import POSITION_OFFSET
from beit3.ops.collectives import all_gather_with_gradient, rank
from beit3.ops.losses import INIT_LOGIT_SCALE, compute_similarities
from beit3.tasks import imagenet, nlvr2

Norm = Callable[[int], nn.Module]


class Pooler(nn.Module):
    """Norm, linear layer and tanh on the first of the states [B, N, D]."""

    def __init__(self, input_features: int, output_features: int, norm_layer: Norm = nn.LayerNorm):
        super().__init__()
        self.norm = norm_layer(input_features)
        self.dense = nn.Linear(input_features, output_features)

    def forward(self, states: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(states[:, 0])))


class TwoLayerMLP(nn.Module):
    """Linear, norm, GELU, linear, preceded by a norm unless `norm_input` is False."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        norm_layer: Norm = nn.LayerNorm,
        norm_input: bool = True,
    ):
        super().__init__()
        self.norm1 = norm_layer(in_features) if norm_input else nn.Identity()
        self.dense1 = nn.Linear(in_features, hidden_features)
        self.norm2 = norm_layer(hidden_features)
        self.act = nn.GELU()
        self.dense2 = nn.Linear(hidden_features, out_features)

    def forward(self, states: Tensor) -> Tensor:
        return self.dense2(self.act(self.norm2(self.dense1(self.norm1(states)))))


class ClipLoss(nn.Module):
    """Contrasts each image with the texts of all processes and each text with their images.

    A retrieval model has it as `criterion`.
    """

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss and the logits [B, world_size * B] of unit features [B, D].

        The loss is the mean over this process's pairs. The logits are those of its images with all
        texts, then those of its texts with all images.
        """
        all_texts = all_gather_with_gradient(text_features)
        all_images = all_gather_with_gradient(image_features)
        image_logits = compute_similarities(image_features, all_texts, logit_scale)
        text_logits = compute_similarities(text_features, all_images, logit_scale)
        batch_size = len(image_features)
        labels = torch.arange(batch_size, device=image_features.device) + rank() * batch_size
        image_loss = F.cross_entropy(image_logits, labels)
        text_loss = F.cross_entropy(text_logits, labels)
        return (image_loss + text_loss) / 2, image_logits, text_logits


class BEiT3ForVisualQuestionAnswering(BEiT3Wrapper):
    """Question answering as classification into a list of answers."""

    def __init__(
        self, args: Any, num_classes: int = 3129, norm_layer: Norm = nn.LayerNorm, **kwargs: Any
    ):
        super().__init__(args)
        dim = args.encoder_embed_dim
        self.pooler = Pooler(dim, dim, norm_layer)
        self.head = nn.Sequential(
            nn.Linear(dim, 2 * dim), norm_layer(2 * dim), nn.GELU(), nn.Linear(2 * dim, num_classes)
        )
        for part in (self.pooler, self.head):
            part.apply(self._init_weights)

    def forward(
        self, image: Tensor, question: Tensor, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Returns logits [B, num_classes]."""
        return self.head(self.pooler(self.beit3(question, image, padding_mask)["encoder_out"]))


class BEiT3ForVisualReasoning(BEiT3Wrapper):
    """Whether a statement about two images is true (NLVR2)."""

    def __init__(
        self, args: Any, num_classes: int = 2, norm_layer: Norm = nn.LayerNorm, **kwargs: Any
    ):
        super().__init__(args)
        dim = args.encoder_embed_dim
        self.head = TwoLayerMLP(4 * dim, 2 * dim, num_classes, norm_layer)
        self.head.apply(self._init_weights)
        for layer in (self.head.dense1, self.head.dense2):
            layer.weight.data.mul_(nlvr2.HEAD_INIT_SCALE)

    def forward(
        self,
        image_a: Tensor,
        image_b: Tensor,
        text_description: Tensor,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns logits [B, num_classes], false before true."""
        padding = None if padding_mask is None else padding_mask.repeat(2, 1)
        images, texts = torch.cat((image_a, image_b)), text_description.repeat(2, 1)
        encoded = self.beit3(texts, images, padding)
        first_tokens = [0, encoded["multiway_split_position"]]
        states = encoded["encoder_out"][:, first_tokens].flatten(1)  # [2B, 2D]
        return self.head(torch.cat(states.chunk(2), 1))


class BEiT3ForImageClassification(BEiT3Wrapper):
    """Classification of the mean of an image's patches."""

    def __init__(
        self, args: Any, num_classes: int = 1000, norm_layer: Norm = nn.LayerNorm, **kwargs: Any
    ):
        super().__init__(args)
        dim = args.encoder_embed_dim
        self.fc_norm = norm_layer(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(self._init_weights)
        for parameter in self.head.parameters():
            parameter.data.mul_(imagenet.HEAD_INIT_SCALE)

    def forward(self, image: Tensor, **kwargs: Any) -> Tensor:
        """Returns logits [B, num_classes]."""
        patches = self.beit3(visual_tokens=image)["encoder_out"][:, 1:]
        return self.head(self.fc_norm(patches.mean(1)))


class BEiT3ForCaptioning(BEiT3Wrapper):
    """Captioning by masked language modeling, in one pass or step by step."""

    def __init__(self, args: Any, **kwargs: Any):
        super().__init__(args)
        self.mlm_head = nn.Linear(args.encoder_embed_dim, args.vocab_size)
        self.mlm_head.apply(self._init_weights)

    def forward(
        self,
        image: Tensor | None,
        text_ids: Tensor,
        padding_mask: Tensor | None,
        language_masked_pos: Tensor | None,
        text_len: int | None = None,
        incremental_state: State | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, State | None]:
        """Predicts the tokens of a text.

        A step without an image continues from `incremental_state`.

        Args:
            image: Normalized images [B, 3, H, W], or None in later steps.
            text_ids: Token ids [B, L]; in later steps the last L of the text.
            padding_mask: [B, L], 1 = padding. Plays no part in later steps.
            language_masked_pos: [B, L], 1 = predict this token; None = predict all.
            text_len: Length of the text, by default L.
            incremental_state: Keys and values of earlier steps, updated in place.

        Returns:
            Logits [B, L, V], or [n, V] of the n masked tokens, and `incremental_state`.
        """
        num_new = text_ids.shape[1]
        text_len = num_new if text_len is None else text_len
        positions = None
        if image is not None:
            if text_len != num_new:
                raise ValueError(
                    f"text_len {text_len} with {num_new} text_ids beside an image: "
                    "give all of them, or leave text_len out"
                )
            patch_size = self.beit3.config.patch_size
            num_patches = (image.shape[2] // patch_size) * (image.shape[3] // patch_size)
            mask = make_image_to_text_mask(1 + num_patches, num_new, device=text_ids.device)
        else:
            if not incremental_state or "prev_key" not in incremental_state.get(0, {}):
                raise ValueError(
                    "no image and no incremental_state of one: the first step needs the image"
                )
            num_cached = incremental_state[0]["prev_key"].shape[2]
            num_image = num_cached + num_new - text_len
            mask = make_image_to_text_mask(num_image, text_len, device=text_ids.device)[-num_new:]
            padding_mask = None
            new_tokens = torch.arange(text_len - num_new, text_len, device=text_ids.device)
            positions = new_tokens[None] + POSITION_OFFSET
        encoded = self.beit3(
            text_ids,
            image,
            padding_mask,
            ~mask,
            incremental_state=incremental_state,
            positions=positions,
        )
        states = encoded["encoder_out"][:, -num_new:]
        if language_masked_pos is not None:
            states = states[language_masked_pos.bool()]
        return self.mlm_head(states), incremental_state


class BEiT3ForRetrieval(BEiT3Wrapper):
    """Image and text features in one space."""

    def __init__(self, args: Any, **kwargs: Any):
        super().__init__(args)
        dim = args.encoder_embed_dim
        self.language_head = nn.Linear(dim, dim, bias=False)
        self.vision_head = nn.Linear(dim, dim, bias=False)
        for head in (self.language_head, self.vision_head):
            head.apply(self._init_weights)
        self.criterion = ClipLoss()
        self.logit_scale = nn.Parameter(torch.tensor(INIT_LOGIT_SCALE))

    def forward(
        self,
        image: Tensor | None = None,
        text_description: Tensor | None = None,
        padding_mask: Tensor | None = None,
        only_infer: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """Returns unit features [B, D] of images and texts, None for inputs that were not given.

        Without `only_infer` the loss precedes them. It compares the pairs of all processes, each of
        which has the mean over its own pairs.
        """
        vision = language = None
        if image is not None:
            states = self.beit3(visual_tokens=image)["encoder_out"]
            vision = F.normalize(self.vision_head(states[:, 0]), dim=-1)
        if text_description is not None:
            states = self.beit3(text_description, text_padding_position=padding_mask)["encoder_out"]
            language = F.normalize(self.language_head(states[:, 0]), dim=-1)
        if only_infer:
            return vision, language
        if vision is None or language is None:
            raise ValueError(
                "a loss needs image and text_description: give both, or only_infer=True"
            )
        loss, _, _ = self.criterion(vision, language, self.logit_scale.exp())
        return loss, vision, language
