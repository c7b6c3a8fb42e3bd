"""``python -m emma_adapter.cli``, which ``accelerate launch -m`` needs."""

from . import main

main(prog_name="emma-adapter")
