"""What is known of operators: one row each, in ``table.py``."""

from autoshard.rules.call import Call, bind, source_line, where
from autoshard.rules.table import RULES, Rule, register_rule, rule_for

__all__ = ["RULES", "Call", "Rule", "bind", "register_rule", "rule_for", "source_line", "where"]
