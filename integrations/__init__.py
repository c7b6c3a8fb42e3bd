"""Everything that knows a third-party model or tool. Imported as ``emma_adapter.integrations``."""
