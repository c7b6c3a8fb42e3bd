"""EmmaUnified, the handle on a model that draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import branches, checkpoint, detaching, training
from .collation import UnifiedCollator
from .config import UnifiedConfig
from .fusion import encode_grouped, fusing
from .losses import prompted_loss
from .module import shared_layers
from .pictures import target_tensors
from .samples import Samples
from .sampling import Callback, GeneratedImages, Generators, check_request, draw
from .state import UnifiedState, unified_state


class EmmaUnified:
    """Handle on the generation branches of one model. It holds no state of its own, so that any number may exist."""

    def __init__(self, model: nn.Module) -> None:
        unified_state(model)
        self.model = model

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the branches on the model, of which the first is ``"default"``."""
        return tuple(self._state.branches)

    @property
    def active_adapter(self) -> str:
        """The name of the active branch: it draws, is trained and saved, and all other methods are about it."""
        return self._state.active

    def add_adapter(
        self,
        name: str,
        config: UnifiedConfig | None = None,
        *,
        autoencoder: str | PathLike[str] | nn.Module | None = None,
    ) -> EmmaUnified:
        """Put another branch on the model, frozen until ``set_adapter(name)``.

        Args:
            name: letters, digits and underscores.
            config: default: that of the active branch.
            autoencoder: as for :func:`unify_model`; default: that of the active branch.

        Raises:
            PatchError: if the name is taken or not allowed.
        """
        branches.add(self.model, name, self.config if config is None else config, autoencoder)
        return self

    def set_adapter(self, name: str) -> EmmaUnified:
        """Make another branch the active one, between calls of the model.

        It is trainable if the previous one was, which is frozen: make a new optimizer.

        Raises:
            PatchError: if there is no branch of that name.
        """
        branches.activate(self.model, name)
        return self

    @property
    def config(self) -> UnifiedConfig:
        """The config with every size filled in."""
        return self._state.config

    @property
    def autoencoder(self) -> Any:
        """The frozen autoencoder itself, for its own settings: ``unified.autoencoder.enable_tiling()``."""
        return self._state.coder.module

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Answer with the original model's bits in ``with unified.disable_adapter(): …``, in this thread or task.

        Without ``fuse_understanding``, answers are the original's anyway.
        """
        return fusing(False)

    def generate_images(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 3.0,
        image_guidance_scale: float = 2.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        solver: str = "euler",
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> GeneratedImages:
        """Draw pictures, or edit reference pictures; the result has them as ``.images``.

        Arguments are named as in diffusers' pipelines. Memory doesn't grow with the number of steps.

        Args:
            prompt: what to draw, or what to change; one, or a list for a batch.
            image: reference pictures: None, one PIL image for all prompts, or a list with None, an image, or a list of
                images for each prompt.
            negative_prompt: what guidance leads away from; default: an empty prompt.
            height: in pixels, a multiple of the autoencoder's compression; default: the first reference picture's, of
                at most a megapixel, or else 512.
            width: likewise.
            num_inference_steps: steps of the solver.
            sigmas: the times to step through instead, falling from at most 1 (noise); they are not shifted.
            guidance_scale: s_T, of the text; 1 means none (see :func:`~emma_adapter.unified.flow.guide`).
            image_guidance_scale: s_I, of reference pictures; 1 means none, and saves a third of an edit's time.
            num_images_per_prompt: how many pictures to draw for each prompt, which is read once.
            generator: of the noise: one, which draws the pictures' noise one after another, or a list with one for
                each picture. None: PyTorch's.
            latents: the noise itself, ``[pictures, C, height / compression, width / compression]``.
            solver: ``"euler"``, or ``"heun"``, which evaluates a step twice.
            output_type: ``"pil"``, ``"np"`` (``[B, H, W, 3]``), ``"pt"`` (``[B, 3, H, W]`` in [0, 1]) or ``"latent"``.
            callback_on_step_end: called as ``callback(unified, step, time, {"latents": x})`` after each step; it may
                return other ``"latents"``, or end the drawing by raising.

        Raises:
            ConfigError: if an argument has a value that is not allowed.
            DataError: if a prompt is empty or longer than the model's context, or a picture can't be read.
            ShapeError: if a size is not a multiple of the compression, or ``latents`` have another shape.
            AutoencoderError: if a picture has NaN or infinite values.
        """
        request = check_request(
            self._state,
            prompt,
            image,
            negative_prompt,
            height,
            width,
            num_inference_steps,
            sigmas,
            guidance_scale,
            image_guidance_scale,
            num_images_per_prompt,
            solver,
            output_type,
        )
        return draw(self.model, self._state, request, generator, latents, callback_on_step_end, self)

    def loss(
        self,
        prompts: str | Sequence[str],
        targets: Any,
        images: Any = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the flow-matching loss of pictures behind their prompts, a scalar in float32.

        While gradients are recorded, ``config.prompt_dropout`` of the prompts are replaced by empty ones.

        Args:
            prompts: one for each target.
            targets: what to draw: PIL images, or a tensor ``[B, 3, H, W]`` in [0, 1]; a list may mix sizes. Sides are
                multiples of the autoencoder's compression. Or the latents that :meth:`encode_images` returned.
            images: reference pictures, as for :meth:`generate_images`. The latents in which a target differs from its
                first one weigh ``config.changed_weight``.
            generator: of noise, times and dropout; None: PyTorch's.

        Raises:
            DataError: if a prompt or picture can't be used, or their numbers differ.
            ShapeError: if a target's sides are not multiples of the compression.
        """
        return prompted_loss(self.model, self._state, prompts, targets, images, generator)

    @torch.no_grad()
    def measure_latents(self, pictures: Any) -> EmmaUnified:
        """Set the mean and standard deviation of each latent channel to those of some training pictures.

        Call it before training: a branch that was trained with other values no longer fits. They are saved with the
        config.

        Args:
            pictures: as ``targets`` of :meth:`loss`; or an iterator of PIL images, of which one is in memory at a time.

        Raises:
            AutoencoderError: if a channel is the same everywhere.
        """
        state = self._state
        device = next(state.module.parameters()).device
        parts = pictures if isinstance(pictures, Iterator) else [pictures]
        tensors = (tensor for part in parts for tensor in target_tensors(part, state.coder.compression))
        mean, std = state.coder.measure(tensor.to(device) for tensor in tensors)
        state.branch.config = state.config.replace(latent_mean=mean, latent_std=std)
        return self

    def compile(self, **options: Any) -> EmmaUnified:
        """Compile the steps of drawing with ``torch.compile``, in the next drawing.

        The compiled code also serves other prompts, sizes and numbers of pictures. Reading the prompt, training and
        the autoencoder are not compiled.

        Args:
            options: of ``torch.compile``; ``disable=True`` undoes it.
        """
        self._state.compile_options = options
        return self

    def set_progress_bar_config(self, **settings: Any) -> EmmaUnified:
        """Set how drawing shows its progress: ``disable=True``, or other arguments of ``tqdm``."""
        self._state.progress_bar = settings
        return self

    @torch.no_grad()
    def encode_images(self, pictures: Any) -> Tensor:
        """Return the normalized latents ``[B, C, h, w]`` of pictures of one size, given as ``targets`` of :meth:`loss`.

        :meth:`loss` also takes the latents, so that pictures needn't be encoded in every epoch.
        """
        state = self._state
        device = next(state.module.parameters()).device
        tensors = target_tensors(pictures, state.coder.compression)
        return torch.stack(encode_grouped(state, [tensor.to(device) for tensor in tensors]))

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return the pictures ``[B, 3, H, W]`` in [0, 1] of normalized latents ``[B, C, h, w]``."""
        state = self._state
        return torch.cat([state.coder.decode(each[None], state.config) for each in latents])

    def collator(
        self, *, size: tuple[int, int] | None = None, folder: str | PathLike[str] = ".", dropout: bool = True
    ) -> UnifiedCollator:
        """Return a collator of rows ``{"prompt", "image"?, "target"}``, for ``Trainer(data_collator=…)``.

        Args:
            size: (height, width) that targets are resized to; None: all of a batch have one size already.
            folder: where relative paths of pictures start.
            dropout: whether a call that records gradients may drop ``config.prompt_dropout`` of the prompts.
        """
        return UnifiedCollator(self._state, size, Path(folder), dropout=dropout)

    def save_pretrained(
        self, directory: str | PathLike[str], *, is_main_process: bool | None = None, samples: Samples = ()
    ) -> None:
        """Write ``unified_config.json``, ``unified_model.safetensors`` and, if there is none, a card, atomically.

        Whenever the process is killed, ``load_unified`` finds either the previous branch or the new one. The folder may
        hold other things: a model, an adapter of ``patch_model``, or a LoRA. The autoencoder isn't saved, but its id
        and a hash of its config are.

        Args:
            directory: the folder, made if it isn't there.
            is_main_process: whether this process writes; default: on rank 0.
            samples: prompts and PIL images that the card shows on the hub.

        Raises:
            OSError: if the folder can't be written; its former contents are intact.
            CheckpointError: if weights are NaN or infinite.
            DataError: if samples aren't prompts and pictures, or there is a card already.
        """
        checkpoint.save(self.model, directory, is_main_process=is_main_process, samples=samples)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload EMMA drawing branch",
        token: str | bool | None = None,
        create_pr: bool = False,
        samples: Samples = (),
    ) -> str:
        """Upload what ``save_pretrained`` writes to a repository on the hub, which is made if there is none.

        It may hold a model, an adapter of ``patch_model`` or a LoRA, whose card stays.

        Args:
            repo_id: ``"user/name"``.
            private: whether a new repository is private; default: the user's or organisation's setting.
            revision: branch, made if there is none.
            commit_message: of the upload.
            token: of the hub; default, and with True: the one that ``hf auth login`` stored, or ``HF_TOKEN``.
            create_pr: open a pull request instead of committing.
            samples: as for :meth:`save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: if weights are NaN or infinite.
            DataError: if samples aren't prompts and pictures, or the repository has a card already.
            huggingface_hub.errors.HfHubHTTPError: if the hub refuses.
        """
        return checkpoint.push(
            self.model,
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
            samples=samples,
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the branch's parameters."""
        return self._state.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the branch's parameters with their names in it."""
        return self._state.module.named_parameters()

    def num_parameters(self) -> int:
        """Return how many parameters the branch has, counted number by number."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train_only(self) -> EmmaUnified:
        """Freeze everything but the branch; prompts then cost no memory for backward."""
        training.train_only(self.model)
        return self

    def unfreeze(self) -> EmmaUnified:
        """Make trainable again what ``train_only`` has frozen, if it was called."""
        training.unfreeze(self.model)
        return self

    def parameter_groups(self, lr: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return groups for an optimizer: the branch's matrices, and its vectors, which don't decay.

        Raises:
            ConfigError: if a rate is not a number, or negative.
        """
        return training.parameter_groups(self.model, lr, weight_decay)

    def delete_adapter(self, name: str) -> EmmaUnified:
        """Take off a branch that isn't the active one.

        Raises:
            PatchError: if it is, or if there is none of that name.
        """
        branches.remove(self.model, name)
        return self

    def remove(self, name: str | None = None) -> None:
        """Take all branches off, after which the handle is of no use.

        An adapter of ``patch_model`` stays; ``unpatch_model`` takes off both.

        Args:
            name: as of :meth:`delete_adapter`; kept from earlier releases for one more.
        """
        if name is None:
            detaching.take_off(self.model)
        else:
            self.delete_adapter(name)

    # Names of earlier releases, kept for one more.
    active = active_adapter
    add, set_active, disabled = add_adapter, set_adapter, disable_adapter

    @property
    def _state(self) -> UnifiedState:
        return unified_state(self.model)

    def __repr__(self) -> str:
        state = self._state
        base: Any = self.model.config
        layers = len(state.module.layers)
        count, total = self.num_parameters(), sum(parameter.numel() for parameter in self.model.parameters())
        names = "" if len(self.names) == 1 else f"active={self.active_adapter!r} of {list(self.names)}, "
        return (
            f"EmmaUnified({names}family={base.model_type!r}, decoupling={self.config.decoupling!r}, "
            f"shared_layers={shared_layers(self.config, layers)} of {layers}, "
            f"autoencoder={state.coder.source or type(state.coder.module).__name__!r} "
            f"({state.coder.compression}x, {state.coder.channels} channels), parameters={count:,} "
            f"({count / total:.3%} of the model))"
        )
