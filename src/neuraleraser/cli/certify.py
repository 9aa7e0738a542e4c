"""`neuraleraser certify` and `neuraleraser verify`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Machine, app, verb
from neuraleraser.errors import SettingsError
from neuraleraser.io.names import printable
from neuraleraser.io.outputs import check_outputs

_SHOWN = 10


@verb(app, "certify")
def certify(folder: Positional[Path], /, out: Path = Path("certificate.json"), key: Path | None = None) -> None:
    """Write the certificate of an evaluation: its figures, and a hash of every image, so that others can check it.

    Args:
        folder: The folder of a finished evaluation, with run.json and report.json.
        out: The certificate.
        key: Private Ed25519 key in PEM to sign it with (openssl genpkey -algorithm ed25519 -out key.pem).
    """
    from neuraleraser.evaluation.certificate import certify as write
    from neuraleraser.evaluation.certificate import read_certificate

    parts = ("run.json", "report.json", "results", "images")
    check_outputs({"--out": out}, {"--key": key} | {f"the evaluation's {name}": folder / name for name in parts})
    write(folder, out, key)
    content = read_certificate(out)
    signed = "not signed" if key is None else f"signed with {key}"
    print(f"{out}: {len(content['rows'])} images, {len(content['figures'])} figures, {signed}")


@verb(app, "verify")
def verify(
    certificate: Positional[Path],
    /,
    public_key: Path | None = None,
    run: Path | None = None,
    erasers: tuple[str, ...] = (),
    model: str = "canvas",
    share: float = 0.05,
    out: Path = Path("runs/verify"),
    other_machine: bool = False,
    machine: Machine = AUTOMATIC,
) -> int:
    """Check a certificate: its hash and signature; with --run every image and figure of the evaluation's folder; with
    --erasers a random share of its images, which are drawn again.

    Args:
        certificate: The certificate.
        public_key: Public Ed25519 key in PEM of whoever should have signed it.
        run: The evaluation's folder.
        erasers: The erasers that it is of, to draw images again: files, folders or Hub ids.
        model: The pipeline: canvas, or a folder with another canvas.
        share: Share of the images that are drawn again.
        out: An empty folder for them.
        other_machine: Bits may differ, as this machine, its threads or its packages are others: figures alone count.
    """
    from neuraleraser.assessment import controls
    from neuraleraser.eraser import Eraser
    from neuraleraser.evaluation.certificate import compare_folder, read_certificate, redraw
    from neuraleraser.evaluation.versions import versions
    from neuraleraser.families import family_of
    from neuraleraser.methods import EraserMethod

    content = read_certificate(certificate, public_key)
    whose = "of a good hash" if public_key is None else f"signed by {public_key}"
    print(f"{certificate}: {whose}, made {printable(content['made'])}, {len(content['rows'])} images")
    wrong = 0
    if run is not None:
        differ = compare_folder(content, run)
        wrong += len(differ)
        same = "every image, figure and setting is as it says (KID and CLIP scores: as its report states them)"
        print(f"{run}: {_listed(differ) or same}")
    if erasers:
        if out.exists() and any(out.iterdir()):
            raise SettingsError(f"--out {out} holds files: pass an empty folder, so that all images are drawn anew")
        check_outputs({}, {"the certificate": certificate}, folders={"--out": out})
        loaded = [Eraser.from_pretrained(source) for source in erasers]
        pipe = machine.open_pipeline(model)
        own = [EraserMethod(e) for e in loaded]
        methods = [m for o in own for m in (o, *controls(o, family_of(pipe).vocabulary))]
        found = redraw(content, pipe, methods, out, share=share)
        wrong += len(found.outside) + (0 if other_machine else len(found.different))
        print(f"{found.drawn - len(found.different)} of {found.drawn} images that were drawn again have the same bits")
        if found.different:
            print(_listed(found.different))
            there, here = content["versions"], versions(pipe)
            for name in [name for name in here if here[name] != there.get(name)]:
                print(f"  {name}: {here[name]} here, {printable(there.get(name))} there")
        print(_listed(found.outside) or "no figure of these images is outside the certificate's interval")
    return 1 if wrong else 0


def _listed(lines: tuple[str, ...] | list[str]) -> str:
    """Return some lines as text; "" if there are none."""
    more = f"\n  ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    shown = "".join(f"\n  {printable(line, 400)}" for line in lines[:_SHOWN])
    return f"{len(lines)} differ:{shown}{more}" if lines else ""
