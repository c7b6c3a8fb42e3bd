"""What tests share: tiny models of the real classes, their processors, formulas, and how errors are caused."""

from pathlib import Path

#: Of the repository.
ROOT = Path(__file__).parents[2]
