"""``manylora bench``: a load generator, other servers to compare with, and GPU checks.

``serving`` and ``peers`` talk HTTP like any client. They import nothing of ``server/engine`` and
``server/http``, and no torch, so that the measuring process takes little from the server that it measures.
``step`` and ``gpu_check`` run the engine itself.
"""
