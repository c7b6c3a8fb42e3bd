"""A trigger for every error that this library raises on purpose: what a user does, and which line answers it."""

from __future__ import annotations

from . import analysis, calls, drawing, encoders, evaluation, experts, files, moda, models, modules, programs, trainers
from .sites import ROOT, Site, all_sites
from .triggers import TRIGGERS, Bench, Trigger

__all__ = ["ROOT", "TRIGGERS", "Bench", "Site", "Trigger", "all_sites"]
# Importing them has registered their triggers.
AREAS = (analysis, models, calls, modules, encoders, files, moda, programs, trainers, drawing, experts, evaluation)
