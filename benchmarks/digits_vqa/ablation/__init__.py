"""The ablation: which part of the adapter gains what, over which control: ``python -m benchmarks.digits_vqa.ablation``.

One JSON line a finished run; an interrupted sweep goes on where it stopped.
"""
