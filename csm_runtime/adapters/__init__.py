"""Adapters: how a stock model's modules map onto :class:`~csm_runtime.adapters.spec.ModelSpec`."""
