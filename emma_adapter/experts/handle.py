"""EmmaVisionExperts, the handle on a model's vision experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

from torch import Tensor, nn

from ..modules.wrappers import base_of
from . import checkpoint, detaching, scopes, training
from .config import ORIGINAL
from .scopes import RoutingReport
from .state import ExpertsState, experts_state


class EmmaVisionExperts:
    """Handle on the vision experts of one model. It holds no state of its own, so that any number may exist.

    Args:
        model: the one that ``add_vision_expert`` or ``load_vision_experts`` was called on, or a wrapper around it.

    Raises:
        PatchError: if it has no experts.
    """

    def __init__(self, model: nn.Module) -> None:
        model = base_of(model)
        experts_state(model)
        self.model = model

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the experts, in the order they were added."""
        return self._state.config.experts

    @property
    def layers(self) -> int:
        """The number of blocks with experts: the last ones of the vision tower that the model uses."""
        return self._state.config.layers

    @property
    def margin(self) -> float:
        """The excess over the original's probability that an expert's needs for it to take an image; can be set."""
        return self._state.config.margin

    @margin.setter
    def margin(self, value: float) -> None:
        self._state.config = self._state.config.replace(margin=value)

    def routed(self, expert: str | None) -> AbstractContextManager[None]:
        """Send every image to one expert in ``with experts.routed("stem"): …``, in this thread or asynchronous task.

        With ``"original"``, images go to no expert; with None, where the router sends them, even while an expert is
        trained.

        Raises:
            ConfigError: if there is no such expert.
        """
        if expert not in (None, ORIGINAL):
            training.require_expert(self._state, expert)
        return scopes.routed(self._state.owner, expert)

    def watched(self) -> AbstractContextManager[RoutingReport]:
        """Record where images go in ``with experts.watched() as report: …``, in this thread or asynchronous task.

        ``report.images`` has, for each image of the block's calls, where it went and the router's probabilities;
        ``report.counts`` has how many went where. Outside of such blocks nothing is recorded.
        """
        return scopes.watched(self._state.owner)

    def train_only(self, expert: str | None = None, *, router: bool = False) -> EmmaVisionExperts:
        """Freeze everything but one expert, or everything but the router.

        An expert is trained by the model's own loss, and every image goes to it, in training and evaluation, until
        the router is trained or :meth:`unfreeze` is called. The router is trained by :meth:`router_loss`.

        Raises:
            ConfigError: if neither or both are named, or there is no such expert.
        """
        training.train_only(self.model, expert, router=router)
        return self

    def unfreeze(self) -> EmmaVisionExperts:
        """Make trainable again what :meth:`train_only` has frozen, and send images where the router says."""
        training.unfreeze(self.model)
        return self

    def router_loss(self, *, labels: Sequence[str], **inputs: Any) -> Tensor:
        """Return the cross-entropy of where images should go, a scalar in float32.

        Its gradients reach only the router, and only what comes before the experts is computed. Of several processes,
        all call this and ``backward`` equally often, each with images of its own; backward averages their gradients.

        Args:
            labels: for each image, then for each video, the name of an expert or ``"original"``.
            inputs: what the model's processor makes; only pixels and their sizes are used.

        Raises:
            ConfigError: if a label is neither.
            DataError: if there are no pixels, or not as many labels as images.
            PatchError: if the router is sharded or offloaded.
            UnsupportedModelError: if the model has no method that encodes images.
        """
        return training.router_loss(self.model, labels, inputs)

    def parameter_groups(
        self, lr: float, *, router_lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return groups for an optimizer of what is trainable: the experts' matrices, their vectors, and the router.

        Args:
            lr: the paper's are 4e-6 for an expert and 1e-4 for the router.
            router_lr: default: ``lr``.
            weight_decay: of the matrices.

        Raises:
            ConfigError: if a rate is not a number, or negative.
        """
        return training.parameter_groups(self.model, lr, lr if router_lr is None else router_lr, weight_decay)

    def save_pretrained(self, directory: str | PathLike[str], *, is_main_process: bool | None = None) -> None:
        """Write ``vision_experts_config.json``, ``vision_experts.safetensors`` and, if there is none, a card.

        They are replaced atomically: whenever the process is killed, ``load_vision_experts`` finds either the previous
        experts or the new ones. The folder may hold other things: a model, a LoRA, or this library's other parts.

        Args:
            directory: the folder, made if it isn't there.
            is_main_process: whether this process writes; default: on rank 0.

        Raises:
            OSError: if the folder can't be written; its former contents are intact.
            CheckpointError: if weights are NaN or infinite.
        """
        checkpoint.save(self.model, directory, is_main_process=is_main_process)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload EMMA vision experts",
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what ``save_pretrained`` writes to a repository on the hub, which is made if there is none.

        It may hold other things, whose card stays.

        Args:
            repo_id: ``"user/name"``.
            private: whether a new repository is private; default: the user's or organisation's setting.
            revision: branch, made if there is none.
            commit_message: of the upload.
            token: of the hub; default, and with True: the one that ``hf auth login`` stored, or ``HF_TOKEN``.
            create_pr: open a pull request instead of committing.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: if weights are NaN or infinite.
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
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the experts' and the router's parameters."""
        return self._state.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the experts' and the router's parameters with their names."""
        return self._state.module.named_parameters()

    def num_parameters(self) -> int:
        """Return how many parameters the experts and the router have, counted number by number."""
        return sum(parameter.numel() for parameter in self.parameters())

    def remove(self, expert: str | None = None) -> None:
        """Take one expert off, or all.

        The router then chooses among those that are left. What ``patch_model`` and ``unify_model`` put on stays;
        ``unpatch_model`` takes off everything. With no expert left, the handle is of no use.

        Raises:
            ConfigError: if there is no such expert.
        """
        if expert is not None:
            training.require_expert(self._state, expert)
        if expert is None or self.names == (expert,):
            detaching.take_off(self.model)
        else:
            detaching.take_one_off(self.model, expert)

    @property
    def _state(self) -> ExpertsState:
        return experts_state(self.model)

    def __repr__(self) -> str:
        config: Any = self.model.config
        count, total = self.num_parameters(), sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"EmmaVisionExperts(family={config.model_type!r}, names={list(self.names)}, layers={self.layers}, "
            f"margin={self.margin:g}, parameters={count:,} ({count / total:.3%} of the model))"
        )
