"""The user's verbs: patch and unpatch a model, load an adapter, name several, train under PEFT, keep a reference."""
