"""Support for third-party models and tools. Imported as ``emma_adapter.integrations``."""
