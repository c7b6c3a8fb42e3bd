"""The text towers of CLIP, SigLIP and SigLIP2 as instruction encoders, through transformers or open_clip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EncoderError
from ..files.hub import is_hub_id
from ..messages import plain, shown

#: ``model_type`` of a checkpoint, with both towers or the text tower alone, to the class of its text tower.
_TEXT_MODELS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "siglip": "SiglipTextModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
    "siglip2_text_model": "Siglip2TextModel",
}


class TransformersTextTower(nn.Module):
    """A text tower through transformers: a hub id or a local folder with weights and tokenizer.

    The tokens are ``hidden_states[layer]`` at all positions of the context, and the mask is true at the tokens of the
    text, its start and end token included. Texts are padded on the right, as the towers were trained:

    - CLIP with token id 0, as the tokenizer of EMMA's authors does (transformers' own pads with the end token);
    - SigLIP and SigLIP2, of lower-cased texts, with the tokenizer's padding token. These towers aren't causal and get
      no attention mask: their encoding of a text depends on the padding after it.

    Raises:
        EncoderError: if the source can't be loaded, is of another family, or lacks weights of the text tower.
    """

    encodes_padding = True

    def __init__(self, source: str, layer: int, *, revision: str | None = None, local_files_only: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        self.tokenizer, self.tower = _load_from_transformers(source, options)
        config = self.tower.config
        # SigLIP2's fixed-resolution checkpoints are of type "siglip" and come with a tokenizer that keeps case, though
        # both generations were trained on lower-cased texts.
        self.lower_cases = config.model_type.startswith("siglip")
        self.pad_id = self.tokenizer.pad_token_id if self.lower_cases else 0
        if self.pad_id is None:
            raise EncoderError(
                f"the tokenizer of {source!r} has no padding token, which SigLIP's text tower reads: give one that the "
                "checkpoint was trained with"
            )
        self.layer = _checked_layer(layer, config.num_hidden_layers, source)
        self.instruction_dim = config.hidden_size
        self.max_instruction_tokens = config.max_position_embeddings

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ``(tokens [B, T, Dt], mask bool [B, T])``, T being the tower's context length."""
        if self.lower_cases:
            texts = [text.lower() for text in texts]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_instruction_tokens)["input_ids"]
        # Padded here, where the texts' lengths are known: SigLIP's padding token is its end token, and the side that
        # a tokenizer pads differs between transformers' versions.
        ids = torch.full((len(texts), self.max_instruction_tokens), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(texts), self.max_instruction_tokens, dtype=torch.bool)
        for row, text_ids in enumerate(encoded):
            ids[row, : len(text_ids)] = torch.tensor(text_ids)
            mask[row, : len(text_ids)] = True
        device = self.tower.device
        # No attention mask: SigLIP was trained without, and CLIP is causal, so that padding can't reach the text.
        hidden_states = self.tower(input_ids=ids.to(device), output_hidden_states=True).hidden_states
        return hidden_states[self.layer], mask.to(device)


def _load_from_transformers(source: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load a checkpoint's tokenizer and text tower."""
    import transformers

    try:
        # The raw config: AutoConfig would offer to run a checkpoint's own code.
        model_type = transformers.PreTrainedConfig.get_config_dict(source, **options)[0].get("model_type")
        if model_type not in _TEXT_MODELS:
            raise EncoderError(
                f"{source!r} is a checkpoint of model_type {shown(model_type)}; text towers of these can be used: "
                f"{', '.join(_TEXT_MODELS)}"
            )
        model_class = getattr(transformers, _TEXT_MODELS[model_type])
        # False, as by default transformers asks the user whether to run a checkpoint's own code.
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        tower, info = model_class.from_pretrained(source, output_loading_info=True, weights_only=True, **options)
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(
            f"the text tower {shown(source)} can't be loaded ({type(error).__name__}: {plain(str(error))}). "
            "Give a hub id or a local folder that holds a CLIP or SigLIP checkpoint and its tokenizer, or use "
            'instruction_encoder="llm"'
        ) from error
    # transformers initializes missing weights at random, and only logs it.
    if missing := sorted(info["missing_keys"]):
        raise EncoderError(
            f"{source!r} lacks {len(missing)} weights of its text tower: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. Give a checkpoint that holds all of it"
        )
    return tokenizer, tower


class OpenClipTextTower(nn.Module):
    """A text tower through open_clip, with its own tokenizer: CLIP's, SigLIP's, or another ``TextTransformer``.

    ``source`` is ``MODEL:PRETRAINED`` (a tag or a local weights file), ``hf-hub:ORG/REPO`` or
    ``local-dir:FOLDER``, a folder with ``open_clip_config.json``, weights and tokenizer. SigLIP's tokenizers come
    from the hub, except with ``local-dir:``. Layers are counted as in transformers: -1 is the output of the last block.

    Raises:
        EncoderError: if the source can't be loaded, or has another kind of text tower.
    """

    encodes_padding = True

    def __init__(self, source: str, layer: int) -> None:
        super().__init__()
        import open_clip

        name, pretrained = _split_open_clip_source(source)
        try:
            text_config = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
            # Its weights would be loaded through AutoModel, which offers to run a checkpoint's own code.
            if text_config.get("hf_model_name"):
                raise EncoderError(
                    f"open_clip's {shown(source)} has a HFTextEncoder as text tower; a TextTransformer, as CLIP and "
                    "SigLIP have, is needed"
                )
            # A config may ask to run a tokenizer's own code. open_clip's own tokenizers don't take the option.
            options = {"trust_remote_code": False} if text_config.get("hf_tokenizer_name") else {}
            # The custom-text form holds the text tower as a module of its own, whatever the model. Weights are
            # required: open_clip's default is a tower of random ones.
            clip = open_clip.create_model(
                name, pretrained=pretrained, force_custom_text=True, require_pretrained=True, weights_only=True
            )
            self.tokenizer = open_clip.get_tokenizer(name, **options)
        except EncoderError:
            raise
        except Exception as error:
            raise EncoderError(
                f"open_clip can't load {shown(source)} ({type(error).__name__}: {plain(str(error))}). "
                "See open_clip.list_pretrained(), or give MODEL:PATH with a local weights file, or local-dir:FOLDER "
                "with weights and tokenizer"
            ) from error
        self.tower = clip.text
        # hidden_states of transformers starts with the embeddings, open_clip counts blocks.
        self.block = _checked_layer(layer, len(self.tower.transformer.resblocks), source) - 1
        if self.block < 0:
            raise EncoderError(
                f"instruction_layer={layer} of {source!r} is its embedding layer; open_clip gives blocks only: "
                "choose another layer"
            )
        self.instruction_dim = int(self.tower.ln_final.weight.shape[0])
        self.max_instruction_tokens = int(self.tower.context_length)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ``(tokens [B, T, Dt], mask bool [B, T])``, T being the tower's context length."""
        ids, mask = self._tokenize(texts)
        ids = ids.to(self.tower.positional_embedding.device)
        out = self.tower.forward_intermediates(ids, indices=[self.block], output_fmt="NLC", intermediates_only=True)
        return out["text_intermediates"][0], mask.to(ids.device)

    def _tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids as open_clip makes them, and a mask of the text's tokens, both ``[B, T]``."""
        import open_clip

        tokenizer = self.tokenizer
        length = self.max_instruction_tokens
        if not isinstance(tokenizer, open_clip.tokenizer.HFTokenizer) or tokenizer.tokenizer_mode:
            ids = tokenizer(texts, context_length=length)
            return ids, _through_first(ids, _end_id(tokenizer))
        # HFTokenizer itself gives no mask, and in older versions of open_clip calls a method that transformers 5
        # dropped.
        encoded = tokenizer.tokenizer(
            [tokenizer.clean_fn(text) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = encoded["input_ids"], encoded["attention_mask"].bool()
        if tokenizer.strip_sep_token:
            ids = ids.masked_fill(ids == tokenizer.tokenizer.sep_token_id, 0)
        return ids, mask


def is_open_clip_name(source: str) -> bool:
    """Return whether open_clip would download ``source``, from its own list or the hub, and read no local file."""
    import open_clip

    name, pretrained = _split_open_clip_source(source)
    if name.startswith("hf-hub:"):
        return is_hub_id(name.removeprefix("hf-hub:"))
    if name.startswith("local-dir:"):
        return False
    return pretrained is None or bool(open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained))


def _split_open_clip_source(source: str) -> tuple[str, str | None]:
    if source.startswith(("hf-hub:", "local-dir:")):
        return source, None
    name, _, pretrained = source.partition(":")
    return name, pretrained or None


def _checked_layer(layer: int, num_layers: int, source: str) -> int:
    """Return ``layer`` as an index from the front into the ``num_layers + 1`` hidden states."""
    if not -(num_layers + 1) <= layer <= num_layers:
        raise EncoderError(
            f"instruction_layer={layer} doesn't exist in {source!r}, which has hidden states "
            f"{-(num_layers + 1)} to {num_layers}"
        )
    return layer % (num_layers + 1)


def _end_id(tokenizer: Any) -> int | None:
    """Return the end token's id of an open_clip tokenizer, which may wrap one of transformers."""
    end_id: int | None = getattr(tokenizer, "eot_token_id", None)
    return end_id if end_id is not None else getattr(getattr(tokenizer, "tokenizer", None), "eos_token_id", None)


def _through_first(ids: Tensor, end_id: int | None) -> Tensor:
    """Return a mask that is true up to and including the first end token; everywhere if the tokenizer has none."""
    if end_id is None:
        return torch.ones_like(ids, dtype=torch.bool)
    ends = (ids == end_id).int()
    return ends.cumsum(dim=1) - ends == 0
