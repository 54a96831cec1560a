"""`edgezmq keys`: CURVE keys for modules that reach the bus over tcp."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from runtime import keys, zap
from runtime.config import load
from runtime.home import CURVE_KEY_VARIABLE, CURVE_SERVER_VARIABLE, find_home


def make(name: str) -> None:
    """Make the pair of `name` and say what to do with it. Raises KeyFault when there is one."""
    home = find_home()
    home.prepare()
    pair = keys.make(home.curve, name)
    print(f"secret key   {home.curve / f'{name}.key_secret'}   (0600; move it to the module's host)")
    print(f"public key   {pair.public}")
    print(f"fingerprint  {zap.fingerprint(pair.public)}")
    if name == keys.BROKER:
        return
    broker = keys.load_or_make(home.curve, keys.BROKER)
    print(f"\nin edgecore.yaml:\n  runtime: {{policy: {{modules: {{{name}: {{keys: ['{pair.public}'], …}}}}}}}}")
    print("\nin the module's environment:")
    print(f"  EDGEZMQ_BUS=tcp://HOST:PORT   (an entry of runtime.bus.listen)\n  {CURVE_KEY_VARIABLE}=FILE")
    print(f"  {CURVE_SERVER_VARIABLE}={broker.public}")


def show(*, as_json: bool) -> None:
    """List the pairs of this node, and whether a rule admits each."""
    home = find_home()
    policy = load(home.path).runtime.policy
    admitted = {key: name for name, rule in policy.modules.items() for key in rule.keys}
    rows = [
        {
            "name": name,
            "public": public,
            "fingerprint": zap.fingerprint(public),
            "admitted_as": admitted.get(public, ""),
        }
        for name, public in (keys.public_keys(home.curve) if home.curve.is_dir() else {}).items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("no keys yet; `edgezmq keys make NAME` makes a pair")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "public key", "fingerprint", "admitted as"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        own = "(the broker itself)" if row["name"] == keys.BROKER else "-"
        table.add_row(row["name"], row["public"], row["fingerprint"], row["admitted_as"] or own)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table, markup=False)
