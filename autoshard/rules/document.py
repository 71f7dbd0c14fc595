"""``docs/rules.md``, written from the table."""

from __future__ import annotations

import inspect
from functools import partial

from autoshard.rules.table import RULES, Rule

HEAD = """# Rules

What each operator does with the axes of its tensors: one row each in `autoshard/rules/table.py`. This
page is written from that table (`make golden`); a brute-force test runs every row on shards.

A letter is an axis, equal letters are the same axis; `+` is summed (split, it leaves a partial sum),
`^` is needed whole, `!` on an operand is added once after the reduction, `~` is looked up by global
index, `*` is any leading dimensions. Where a rule depends on arguments, the page says what it does.
Operators with PyTorch's tag `pointwise` need no row: their dimensions are aligned from the right and
pass. All others keep their operands whole and are listed in `plan.unknown`.

An operator of your own gets its rule in one line:

```python
@torch.library.custom_op("mine::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight

autoshard.register_rule(torch.ops.mine.scaled.default, "* h, h -> * h")
```

With it, `h` may be split over ranks; `autoshard.verify` checks the promise on your model.

| operator | rule | |
|---|---|---|
"""


def rules_document() -> str:
    """The page."""
    return HEAD + "\n".join(_line(name, rule) for name, rule in sorted(RULES.items())) + "\n"


def _line(name: str, rule: Rule) -> str:
    local = "its sizes are made local" if rule.localize is not None else ""
    if "->" in rule.text:
        text = f"`{rule.text}`"
    else:
        function = rule.apply.func if isinstance(rule.apply, partial) else rule.apply
        text = (inspect.getdoc(function) or "").partition("\n")[0].replace("``", "`")
        text = text or "the dimension of `dim` is needed whole, the others pass"
    return f"| `{name}` | {text.replace('|', chr(92) + '|')} | {local} |"
