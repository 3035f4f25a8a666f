"""`resplit models`: what is in this machine's store."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resplit.commands.privacy import privacy
from resplit.defaults import DEFAULT_URL
from resplit.exits import Commands
from resplit.options import DEFAULT_STORE, AsJson, Keys, StoreFolder, Url
from resplit.output import Progress, print_json, print_table, progress_bar, size
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from models.store import Store
    from schemas.pipeline import Pipeline, Task

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Import, seal, look at, verify, probe and remove models.")

PrecisionName = Literal["fp32", "fp16", "int4"]
Model = Annotated[str, typer.Argument(help="A model's name or the digest of its manifest.")]


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder, `hf:owner/name`, an ONNX file, a pipeline's .toml, or `adder`, which is along."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What to call it here; default: after its source.")] = None,
    precision: Annotated[
        PrecisionName, typer.Option(help="Of the weights of a decoder that is exported here.")
    ] = "fp32",
    provider: Annotated[Literal["cpu", "cuda"], typer.Option(help="What a decoder's graph is built for.")] = "cpu",
    sealed: Annotated[
        bool, typer.Option("--sealed", help="Store it encrypted: a node can open the blocks that it hosts, no others.")
    ] = False,
    store: StoreFolder = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Cut a model into blocks and store them."""
    from models.importer import import_model  # noqa: PLC0415
    from models.sealer import import_sealed  # noqa: PLC0415

    opened = _open(store)
    with progress_bar() as progress:
        bring = import_sealed if sealed else import_model
        imported, digest = bring(source, opened, name, precision, progress, provider)
    if as_json:
        print_json({"name": imported, "digest": digest})
        return
    manifest = opened.manifest(digest)
    print(f"{imported}: {len(manifest.blocks)} blocks, {size(manifest.stored_bytes)}, digest {digest}")


@app.command()
def adapt(
    base: Annotated[str, typer.Argument(help="A decoder in the store, by name or digest.")],
    adapter: Annotated[
        str | None, typer.Argument(help="The folder of a LoRA adapter, as PEFT saves it; without, room for one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What to call the variant; default: like the folder.")] = None,
    store: StoreFolder = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Lay a LoRA adapter over a model, as a variant that shares all of the model's weights.

    Variants of one base are the same blocks with small matrices of their own: a node keeps and loads the base once.
    Without an adapter the base itself comes out in that form, so that it shares its blocks with its variants.
    """
    from models.importer import name_of  # noqa: PLC0415
    from models.lora import import_variant  # noqa: PLC0415

    opened = _open(store)
    called = name or (name_of(Path(adapter).expanduser().resolve().name) if adapter else f"{base}-base")
    made, digest = import_variant(base, adapter, opened, called)
    if as_json:
        print_json({"name": made, "digest": digest})
        return
    blocks = opened.manifest(digest).blocks
    own, shared = sum(b.adapter_bytes for b in blocks), sum(b.session_bytes for b in blocks)
    print(f"{made}: {len(blocks)} blocks, {size(own)} of its own over {size(shared)} of {base}, digest {digest}")


@app.command()
def where(
    name: Annotated[str, typer.Argument(help="A model in the orchestrator's store, by name or digest.")],
    keys: Keys,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say which blocks of a model are where in the cluster, in memory or on a disk, and for whom."""
    import asyncio  # noqa: PLC0415

    from resplit import control  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415

    found = asyncio.run(control.where(Access(url, keys), name))
    if as_json:
        print_json(found)
        return
    print(f"{found.name}: {found.blocks} blocks, all of them in the orchestrator's store; digest {found.model}")
    rows = [
        [one.node, one.tier, ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in one.ranges), "; ".join(one.why)]
        for one in found.at
    ]
    if rows:
        print_table("where", ["node", "tier", "blocks", "for"], rows)


@app.command()
def seal(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    store: StoreFolder = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Encrypt a model in the store, and delete its plaintext there.

    Each block gets a key of its own; the keys are kept in the store's folder `keys`, which is never served. From
    then on the name means the sealed model, which is another one: deploy it again.
    """
    from models.sealer import seal_model  # noqa: PLC0415

    opened = _open(store)
    with progress_bar() as progress:
        _, digest = seal_model(opened, name, opened, progress)
    if as_json:
        print_json({"name": name, "digest": digest})
    else:
        print(
            f"{name}: sealed, digest {digest}; its keys are in {opened.keys_folder}: keep a copy where nobody reads it"
        )


@app.command("list")
def list_(store: StoreFolder = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List the models in the store."""
    opened = _open(store)
    manifests = {name: (digest, opened.manifest(digest)) for name, digest in opened.names().items()}
    if as_json:
        summary = [
            {
                "name": name,
                "digest": digest,
                "kind": m.kind,
                "precision": m.precision,
                "blocks": len(m.blocks),
                "bytes": m.stored_bytes,
                "sealed": m.is_sealed,
            }
            for name, (digest, m) in manifests.items()
        ]
        print_json({"models": summary})
        return
    if not manifests:
        print(f"no models in {opened.root}; import one with `resplit models import`")
        return
    rows = [
        [
            name,
            digest[:12],
            m.kind,
            m.precision,
            str(len(m.blocks)),
            size(m.stored_bytes),
            "yes" if m.is_sealed else "-",
        ]
        for name, (digest, m) in manifests.items()
    ]
    print_table("", ["name", "digest", "kind", "precision", "blocks", "size", "sealed"], rows)


@app.command()
def show(model: Model, store: StoreFolder = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Show a model block by block: what each weighs and what crosses to the next."""
    from models.keyring import has_keys  # noqa: PLC0415

    opened = _open(store)
    digest = opened.resolve(model)
    manifest = opened.manifest(digest)
    if as_json:
        print_json({"digest": digest, "manifest": manifest})
        return
    print(f"{manifest.name}  {digest}")
    print(f"  {manifest.kind}, {manifest.architecture}, {manifest.precision}; {size(manifest.stored_bytes)}")
    print(f"  from {manifest.source}; {manifest.cut}")
    if manifest.is_sealed:
        where = "here" if has_keys(opened, digest) else "not here: it cannot be deployed from here"
        print(f"  sealed; its keys are {where}")
    if manifest.text is not None:
        print(f"  vocabulary {manifest.text.vocab_size}, context {manifest.text.context_length} tokens")
    if manifest.pipeline is not None:
        _show_pipeline(manifest.pipeline, {digest: name for name, digest in opened.names().items()})
        return
    rows = [
        [
            str(block.index),
            block.role,
            size(block.weight_bytes),
            str(block.kv_bytes_per_token),
            f"{block.flops_per_token / 1e6:.2f}",
            "-" if block.output is None else f"{block.output.dtype}[{','.join(map(str, block.output.shape))}]",
        ]
        for block in manifest.blocks
    ]
    print_table("", ["block", "role", "weights", "KV bytes/token", "Mflop/token", "passes on"], rows)


def _show_pipeline(pipeline: "Pipeline", names: Mapping[str, str]) -> None:
    services = [
        [name, names.get(one.model, one.model[:12]), one.kind, str(one.stages or 1), str(one.replicas)]
        for name, one in pipeline.services.items()
    ]
    print_table("", ["service", "model", "kind", "stages", "replicas"], services)
    print()
    tasks = [
        [name, f"{task.slo.deadline_ms:g}", f"{task.rate_per_s:g}", _told_way(task), ", ".join(task.outputs)]
        for name, task in pipeline.tasks.items()
    ]
    print_table("", ["task", "deadline ms", "requests/s", "services, each after those it waits for", "gives"], tasks)


def _told_way(task: "Task") -> str:
    parts = [f"{name} ({', '.join(sorted(task.after[name]))})" if task.after[name] else name for name in task.order]
    return ", ".join(parts)


@app.command()
def verify(
    model: Annotated[str | None, typer.Argument(help="A model's name or digest; default: all of them.")] = None,
    store: StoreFolder = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Hash every file of a model and compare; ends with 3 for a missing file and 1 for a corrupt one."""
    opened = _open(store)
    names = [model] if model is not None else list(opened.names())
    with progress_bar() as progress:
        for name in names:
            # Several models are shown one after the other, each under its own name.
            opened.verify_model(name, partial(_named, progress, name))
    if as_json:
        print_json({"verified": names})
    else:
        print("\n".join(f"{name}: every file is whole" for name in names) or "no models to verify")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    with_keys: Annotated[
        bool, typer.Option("--with-keys", help="Also of a sealed model, which nobody can open without its keys.")
    ] = False,
    store: StoreFolder = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Forget a model and delete the files that no other model uses."""
    from models.keyring import has_keys  # noqa: PLC0415

    opened = _open(store)
    model = opened.resolve(name)
    if has_keys(opened, model) and list(opened.names().values()).count(model) == 1 and not with_keys:
        message = (
            f"{name} is sealed, and its keys would be deleted with it: copies of it on nodes and in other stores could "
            f"not be opened again; keep {opened.keys_folder / model}, or say --with-keys if nobody is to open them"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "with_keys")
    freed = opened.remove(name)
    if as_json:
        print_json({"removed": name, "freed_bytes": freed})
    else:
        print(f"{name}: removed, {size(freed)} freed")


app.command()(privacy)


def _named(progress: Progress, name: str, what: str, done: int, total: int) -> None:
    progress(f"{what} {name}", done, total)


def _open(folder: Path) -> "Store":
    from models.store import Store  # noqa: PLC0415

    return Store(folder.expanduser())
