"""``mopefuse data cache``."""

from __future__ import annotations

from typing import Annotated

import typer

from mopefuse.cli.shared_options import Json

_KINDS = {
    "index": "indexes of splits",
    "features": "features of encoders",
    "prefixes": "outputs of early layers",
    "tokens": "output tokens of encoders",
    "shards": "contents of shards",
    "remote": "copies of remote files",
    "galleries": "embeddings of galleries",
    "images": "decoded images",
    "models": "models from the hub",
    "charts": "chart scripts",
}


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete the cache. Entries are computed again when needed.")] = False,
    json: Json = False,
) -> None:
    """Show the cache, or delete it.

    The cache holds table indexes, features of frozen encoders, outputs of their early layers and decoded images, which all
    runs share. Set its folder with the environment variable MOPEFUSE_CACHE.
    """
    from mopefuse.cli._render import out, print_json, size, table
    from mopefuse.core import cache as store

    entries = list(store.entries())
    freed = store.clear() if clear else 0
    if json:
        listed = [{"kind": kind, "bytes": size, "path": str(path), **_about(facts)} for kind, path, size, facts in entries]
        print_json({"ok": True, "folder": str(store.root() or ""), "entries": listed, "freed_bytes": freed})
        return
    rows = []
    for kind, meaning in _KINDS.items():
        mine = [(length, facts) for other, _, length, facts in entries if other == kind]
        count = sum(int(facts.get("images" if kind == "images" else "rows") or 0) for _, facts in mine)
        rows.append([meaning, str(len(mine)), f"{count:,}" if count else "", size(sum(length for length, _ in mine))])
    table(f"{store.root() or 'no cache: no writable folder found'}", ["cached", "entries", "samples", "size"], rows)
    if clear:
        out().print(f"removed: {size(freed)}", markup=False)


def _about(facts: dict[str, object]) -> dict[str, object]:
    return {name: facts[name] for name in ("root", "split", "encoder", "rows", "images") if name in facts}
