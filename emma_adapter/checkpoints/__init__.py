"""Adapter folders, and what else holds adapters: base models' folders, LoRAs' and Trainer's, the hub's."""
