"""The check of a base at every start (``StartCheck``). It knows models and adapters, not the scheduler.

Reading order: ``start_check.py``, then its parts: ``sample.py`` (requests and steps), ``reference.py`` (what
transformers computes), ``low_rank.py`` (the adapter), ``deviation.py``, ``causes.py``, ``facts.py`` and
``verdicts.py``. ``alone.py`` is the check without a server.
"""

from server.engine.check.alone import check_alone
from server.engine.check.start_check import BOUND, StartCheck

__all__ = ["BOUND", "StartCheck", "check_alone"]
