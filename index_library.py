"""Index a folder of music for search by text: audio -> plain vectors kept on disk -> Milvus."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from logging import Logger
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, run_script
from common.files import locked
from common.logs import start_log
from embedding_models.base import AudioEmbeddingModel
from embedding_models.enrichment import RECIPE
from embedding_models.precision import PRECISIONS
from embedding_models.registry import EncoderSpec, add_encoder_flags, find_encoder, model_flag, spec_from_flags
from embedding_models.track_workers import embed_tracks
from music_library.evaluation import ENOUGH, NEIGHBOURS, probing, sampled
from music_library.flags import add_library_flags
from music_library.index_space import IndexSpace, read_head
from music_library.milvus_index import AUTO, INDEX_TYPES, IndexChoice, VectorDatabase, is_local, kind_of_parameters
from music_library.planning.plan import PlannedIndex, PlannedSpace, plan_lines
from music_library.searching import moments_collection
from music_library.updating import bring_over, check_collections, look_through, prune, sync, take_events
from music_library.vector_files import Track, VectorFiles, kept_vectors
from text_to_audio.config import TrainingConfig
from text_to_audio.model.head import ProjectionHead

EXAMPLES = """examples:
  python index_library.py ~/Music --audio-encoder muq --plan
  python index_library.py ~/Music --checkpoint checkpoints/muq_best_r1.pt
  python index_library.py ~/Music --checkpoint checkpoints/muq_best_r1.pt --moments --prune
  python index_library.py ~/Music --audio-encoder muq --encoder-processes 2 --device cuda
  python index_library.py --reindex --checkpoint checkpoints/new/muq_best_r1.pt      (without decoding audio)
  python index_library.py --from-collection tracks --from-uri http://localhost:19530 --audio-encoder muq
  python index_library.py ~/Music --audio-encoder muq --milvus-uri http://localhost:19530 --milvus-token user:word

The same command goes on where it was stopped; unchanged files are skipped."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("music_dir", nargs="?", metavar="MUSIC_DIR", help="folder with the music; it may change from run to run")
    add("--audio-encoder", metavar="NAME", help="short for --checkpoint checkpoints/NAME_best_r1.pt")
    add_library_flags(parser, None)
    add("--moments", action="store_true", help="also index every ten seconds, to find moments inside tracks")
    add("--prune", action="store_true", help="take out tracks that are no longer in MUSIC_DIR")
    add("--reindex", action="store_true", help="make the index anew from the plain vectors, as for a new checkpoint")
    add("--from-collection", metavar="NAME", help="take over a Milvus collection of plain vectors of this recipe")
    add("--from-uri", metavar="URI", help="where that collection is (--milvus-uri)")
    add("--from-token", help="its server's token")
    auto = "auto: exact (FLAT) as long as that is quick, then HNSW"
    add(
        "--index-type",
        choices=(AUTO, *INDEX_TYPES),
        help=f"{auto} (default: as the index there is was made, else auto)",
    )
    add("--index-params", type=_json, metavar="JSON", help="such as '{\"nlist\": 1024}'; used when an index is made")
    add("--search-params", type=_json, metavar="JSON", help="such as '{\"nprobe\": 64}'; used when an index is made")
    add("--narrow", action="store_true", help="the narrow form for any width (it is used above 32,768 dimensions)")
    add_encoder_flags(parser, "the one the checkpoint names")
    add("--dtype", choices=PRECISIONS, default="float32", help="precision of the encoder on CUDA (%(default)s)")
    add("--batch-size", type=int, default=8, help="windows of 10 s per encoder call (%(default)s)")
    add("--encoder-processes", type=int, default=1, help="processes that decode and encode (%(default)s)")
    add("--plan", action="store_true", help="print tracks, hours, disk and memory for MUSIC_DIR; write nothing")
    return parser


def _json(text: str) -> dict:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text!r}")
    return content


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit code and raises `UserError` for what the user can mend."""
    args = build_parser().parse_args(argv)
    named = args.checkpoint is not None
    check_arguments(args)
    if args.plan:
        for line in plan_lines(planned_index(args, named)):
            print(line)
        return 0
    head, config, audio_space = read_head(args.checkpoint)
    check_space(args, config, audio_space)
    log = start_log("index_library", "index_library.log")
    folder = library_folder(args, config.audio_encoder)
    about = {
        "space": config.audio_encoder,
        "dim": config.audio_dim,
        "recipe": audio_space["recipe"],
        "encoder": audio_space["id"],
        "revision": audio_space.get("revision"),
    }
    with writing(folder / config.audio_encoder), VectorFiles(folder, config.audio_encoder, about) as files:
        moments = args.moments or files.holds_windows
        space, choice = open_space(args, config.audio_encoder, head, about, files.folder)
        if args.from_collection:
            take_over(args, head.standardises, files, log)
        left_out = update(args, config, audio_space, files, moments, log) if args.music_dir else 0
        put_in(args, files, space, choice, moments, log)
    if left_out:
        log.info("files left out: %d; index_library.log names each", left_out)
    return 0


def planned_index(args: argparse.Namespace, named: bool) -> PlannedIndex:
    """What `--plan` is made for. named: whether there is a --checkpoint; without one the encoder is the published one.

    Raises `UserError` where MUSIC_DIR is not given, and for a checkpoint that is named and cannot be read.
    """
    if not args.music_dir:
        raise UserError("--plan: expected MUSIC_DIR, the folder that it is made for")
    if named or Path(args.checkpoint).exists():
        _, config, recorded = read_head(args.checkpoint)
        check_space(args, config, recorded)
        entry, hidden_dim, origin = find_encoder(config.audio_encoder), config.hidden_dim, args.checkpoint
        spec = spec_from_flags(args, entry, args.device, args.dtype, recorded["id"], recorded.get("revision"))
        dim = config.audio_dim
    else:
        entry, hidden_dim = find_encoder(args.audio_encoder), TrainingConfig.hidden_dim
        spec, dim = spec_from_flags(args, entry, args.device, args.dtype), entry.dim
        origin = f"no {args.checkpoint} yet: as published"
        if model_flag(args, entry):
            dim, origin = spec.load().dim, f"no {args.checkpoint} yet: as the model has it"
    folder = Path(args.vectors_dir) if args.vectors_dir else kept_vectors(args.milvus_uri, None)
    return PlannedIndex(
        space=PlannedSpace(entry.name, spec, dim, hidden_dim, origin),
        music=Path(args.music_dir),
        folder=folder,
        uri=args.milvus_uri,
        kind=args.index_type or kind_of_parameters(args.index_params, args.search_params) or AUTO,
        narrow=args.narrow,
        moments=args.moments,
        batch_size=args.batch_size,
        processes=args.encoder_processes,
    )


def library_folder(args: argparse.Namespace, space: str) -> Path:
    """Where the plain vectors of this library are kept."""
    if args.vectors_dir:
        return Path(args.vectors_dir)
    if is_local(args.milvus_uri):
        return kept_vectors(args.milvus_uri, None)
    with VectorDatabase(args.milvus_uri, args.milvus_token) as database:
        return kept_vectors(args.milvus_uri, database.identity(space))


def open_space(
    args: argparse.Namespace, name: str, head: ProjectionHead, about: dict, folder: Path
) -> tuple[IndexSpace, IndexChoice]:
    """How the space stands in the index, and the index's type; `UserError` where the index there is of another.

    The database is closed again: others may search while audio is being embedded.
    """
    with VectorDatabase(args.milvus_uri, args.milvus_token, create=True) as database:
        found = database.identity(name) or {}
        narrow = True if args.narrow else None if args.reindex else found.get("narrow")
        space = IndexSpace(name, head, about["recipe"], about["encoder"], narrow, folder)
        check_collections(database, space, args.checkpoint, args.reindex)
    of_parameters = kind_of_parameters(args.index_params, args.search_params) if not args.index_type else None
    kind = args.index_type or of_parameters or found.get("index_choice") or found.get("index_type") or AUTO
    return space, IndexChoice(kind, args.index_params, args.search_params)


def put_in(
    args: argparse.Namespace, files: VectorFiles, space: IndexSpace, choice: IndexChoice, moments: bool, log: Logger
) -> None:
    """Make Milvus hold what the plain vectors say, and tell what is there."""
    with VectorDatabase(args.milvus_uri, args.milvus_token) as database:
        with tqdm(unit="row", desc="indexing") as bar:
            synced = sync(files, database, space, choice, moments, args.reindex, bar.update)
        count = database.count(space.name)
        if synced.put or synced.removed:
            for name, (kind, _) in synced.kinds.items():
                if kind == "IVF_FLAT":
                    tell_of_lists(database, name, space, files, log)
    for name, (kind, outgrown) in synced.kinds.items():
        if outgrown:
            log.info("%s: outgrew an exact search (%s): now %s, made anew from the plain vectors", name, outgrown, kind)
    log.info("%s: %s rows put in, %s taken out", args.milvus_uri, f"{synced.put:,}", f"{synced.removed:,}")
    narrow = f" (narrow form of {space.audio_dim:,})" if space.narrow else ""
    extra = ", with moments" if moments else ""
    kinds = {name: kind for name, (kind, _) in synced.kinds.items()}
    if kinds.get(moments_collection(space.name), kinds[space.name]) != kinds[space.name]:
        extra += f" ({kinds[moments_collection(space.name)]})"
    tracks = f"{count:,} tracks in {space.name!r}, {kinds[space.name]}, {space.dim:,} dimensions"
    log.info("%s: %s%s%s", args.milvus_uri, tracks, narrow, extra)


def tell_of_lists(database: VectorDatabase, name: str, space: IndexSpace, files: VectorFiles, log: Logger) -> None:
    """Warn where an IVF_FLAT index probes too few of its lists, and say how many it takes."""
    ids, plain = sampled(files, windows=name != space.name)
    found = probing(database, name, space.audio(plain), ids)
    if found.share < ENOUGH:
        built = {"nlist": found.lists}  # else --reindex makes the usual number of lists
        given = "" if built.items() <= INDEX_TYPES["IVF_FLAT"][0].items() else f" --index-params '{json.dumps(built)}'"
        log.warning(
            "%s: IVF_FLAT with nprobe %d finds %.0f %% of the %d nearest of %d stored vectors; nprobe %d of %d lists "
            "finds %.0f %%: run again with --reindex --index-type IVF_FLAT%s --search-params '%s'",
            name, found.nprobe, 100 * found.share, NEIGHBOURS, len(ids), found.needed, found.lists,
            100 * found.share_of_needed, given, json.dumps({"nprobe": found.needed}),
        )  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Raise one `UserError` for arguments that do not go together or are out of range; settle the checkpoint."""
    if not args.checkpoint and not args.audio_encoder:
        raise UserError("expected --checkpoint FILE, or --audio-encoder NAME for checkpoints/NAME_best_r1.pt")
    args.checkpoint = args.checkpoint or f"checkpoints/{args.audio_encoder}_best_r1.pt"
    if not (args.music_dir or args.reindex or args.from_collection):
        raise UserError("expected MUSIC_DIR, --reindex or --from-collection")
    if args.prune and not args.music_dir:
        raise UserError("--prune: expected MUSIC_DIR, which it compares the index with")
    if args.music_dir and not Path(args.music_dir).is_dir():
        raise UserError(f"{args.music_dir}: expected a folder of music, found {_kind(Path(args.music_dir))}")
    for flag in ("batch_size", "encoder_processes"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: expected at least 1, found {getattr(args, flag)}")


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "nothing"


def check_space(args: argparse.Namespace, config: TrainingConfig, audio_space: dict) -> None:
    """Raise `UserError` where the checkpoint is for another encoder or recipe than this toolkit computes."""
    if args.audio_encoder and args.audio_encoder != config.audio_encoder:
        raise UserError(
            f"{args.checkpoint}: expected a checkpoint for {args.audio_encoder!r}, found {config.audio_encoder!r}"
        )
    if args.music_dir and audio_space["recipe"] != RECIPE:
        raise UserError(
            f"{args.checkpoint}: expected vectors of the recipe {RECIPE!r}, which this version computes, "
            f"found {audio_space['recipe']!r}; train on a store of this version"
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the plain vectors of a space for one writer; `UserError` where another run has them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, found: {error.strerror}") from error
    with locked(folder / "writing.lock", f"{folder}: another index_library.py writes there"):
        yield


def take_over(args: argparse.Namespace, standardises: bool, files: VectorFiles, log: Logger) -> None:
    """Bring a collection of plain vectors over."""
    uri = args.from_uri or args.milvus_uri
    token = args.from_token or (args.milvus_token if uri == args.milvus_uri else None)
    with VectorDatabase(uri, token) as source, tqdm(unit="track", desc="bringing over") as bar:
        taken = bring_over(source, args.from_collection, files, standardises, bar.update)
    log.info("%s: %s tracks of %r, taken to be of this recipe", uri, f"{taken:,}", args.from_collection)


def load_encoder(
    args: argparse.Namespace, config: TrainingConfig, recorded: dict
) -> tuple[EncoderSpec, AudioEmbeddingModel]:
    """The encoder the checkpoint names, or the one of the flags; `UserError` where its width is another.

    recorded: what the checkpoint says of its audio space.
    """
    entry = find_encoder(config.audio_encoder)
    spec = spec_from_flags(args, entry, args.device, args.dtype, recorded["id"], recorded.get("revision"))
    try:
        encoder = spec.load()
    except UserError as error:
        given = model_flag(args, entry)
        hint = "" if given else f"; the checkpoint names this encoder, --{entry.name}-model says where else it is"
        raise UserError(f"{error}{hint}") from error
    if encoder.dim != config.audio_dim:
        raise UserError(
            f"{spec.model}: expected vectors {config.audio_dim:,} wide, as {args.checkpoint} was trained on, "
            f"found {encoder.dim:,}"
        )
    return spec, encoder


def update(
    args: argparse.Namespace, config: TrainingConfig, recorded: dict, files: VectorFiles, moments: bool, log: Logger
) -> int:
    """Bring the plain vectors up to date with the folder; returns how many files were left out."""
    folder = Path(args.music_dir)
    with tqdm(unit="file", desc="looking") as bar:
        changes = look_through(folder, files, moments, bar.update)
    if not changes.present:
        raise UserError(f"{folder}: expected audio files, found none")
    for line in changes.lines():
        log.warning("left out %s", line)
    log.info(
        "%s: %d unchanged, %d touched, %d moved or copied, %d to be embedded",
        folder, changes.unchanged, changes.touched, changes.moved, len(changes.todo),
    )  # fmt: skip
    left_out = changes.count_left_out
    if changes.todo:
        left_out += embed(args, config, recorded, files, changes.todo, moments, log)
    if args.prune:
        log.info("pruned %d tracks that are no longer there", prune(files, changes))
    return left_out


def embed(
    args: argparse.Namespace,
    config: TrainingConfig,
    recorded: dict,
    files: VectorFiles,
    todo: list[Track],
    moments: bool,
    log: Logger,
) -> int:
    """Embed the tracks that need it; returns how many could not be."""
    spec, encoder = load_encoder(args, config, recorded)
    tracks = {track.id: track for track in todo}
    paths = ((track.id, Path(track.path)) for track in todo)
    events = embed_tracks(paths, encoder, spec, args.encoder_processes, args.batch_size, moments)
    left_out = 0
    with tqdm(total=len(tracks), unit="track", desc="embedding") as bar:
        for track, reason in take_events(events, tracks, files, moments):
            if reason is not None:
                log.warning("left out %s", reason if reason.isprintable() else repr(reason)[1:-1])
                files.remove([track.id])  # what was indexed of it is of an older content
                left_out += 1
            bar.update()
    return left_out


if __name__ == "__main__":
    run_script(main)
