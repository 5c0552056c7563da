"""The README of an export: a model card filled from the run."""

from ultradino_jax.exports.format import Format
from ultradino_jax.weights.backbone import Backbone

_TAGS = {
    "backbone": "image-feature-extraction",
    "classifier": "image-classification",
    "segmenter": "image-segmentation",
}


def model_card(
    form: Format, backbone: Backbone, facts: dict, report: dict, licence: str
) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    facts: of `heads.run_facts`. report: of `checked.export`. licence: an SPDX id, or
    ''.
    """
    model = backbone.model
    what = (
        "A Vision Transformer that turns an ultrasound image into features: "
        f"{model.depth} blocks,\n{model.embed_dim} wide, patches of {model.patch_size} "
        f"pixels, {model.num_registers} registers."
    )
    name = "Dinov2WithRegistersModel" if model.num_registers else "Dinov2Model"
    sections = {
        "Use": _use(form.usage["backbone"], backbone, name) + "\n\n" + _input(backbone),
        "Training": _training(facts),
        "Checks": _checks(report, "Features agree"),
        "Intended use and limits": _RESEARCH_FEATURES + _LIMITS,
    }
    return _card(form, report, backbone.name, what, sections, licence)


def task_card(form: Format, task, facts: dict, report: dict, licence: str) -> str:
    """The card of a Classifier or Segmenter; facts: of `trained.load_trained`."""
    backbone, which = task.backbone, report["kind"]
    registers = getattr(getattr(backbone, "model", None), "num_registers", 0)
    head = "Dinov2WithRegisters" if registers else "Dinov2"
    names = "\n".join(f"{i}. {name}" for i, name in enumerate(task.classes))
    verb = "sorts" if which == "classifier" else "outlines the structures of"
    sections = {
        "Classes": names,
        "Use": _use(form.usage[which], backbone, f"{head}ForImageClassification")
        + "\n\n"
        + _input(backbone, getattr(task, "letterbox", False)),
        "Training": _evaluation(facts),
        "Checks": _checks(report, "Logits agree"),
        "Intended use and limits": _RESEARCH_TASK + _LIMITS,
    }
    what = f"A {which} that {verb} an ultrasound image, on {backbone.name}."
    return _card(form, report, f"{backbone.name} {which}", what, sections, licence)


_LIMITS = """ Not a medical device; not for diagnosis or
for decisions about a patient. Expect it to reflect the machines, the operators and the
population of its training images."""
_RESEARCH_FEATURES = """Research on ultrasound images: features for classifiers,
segmenters and retrieval that are validated on the data they are used on."""
_RESEARCH_TASK = "Research on ultrasound images of the kind it was trained on."


def _card(form: Format, report, title, what, sections, licence) -> str:
    library = form.hub_library
    front = [
        f"license: {licence or 'other'}",
        *([f"library_name: {library}"] if library else []),
        f"pipeline_tag: {_TAGS[report['kind']]}",
        "tags: [ultrasound, fetal, dinov2, self-supervised]",
    ]
    unstated = (
        "Not stated. Weights inherit conditions of the data they were trained on."
    )
    sections = {**sections, "Licence": licence or unstated}
    parts = ["---", *front, "---", "", f"# {title}", "", what]
    for heading, text in sections.items():
        parts += ["", f"## {heading}", "", text]
    return "\n".join(parts) + "\n"


def _use(template: str, backbone, cls: str) -> str:
    side, channels = backbone.image_size, backbone.channels
    model = getattr(backbone, "model", None)
    registers = getattr(model, "num_registers", 0)
    return template.format(
        cls=cls,
        architecture=f"vit_base_patch16_{side}",
        c=channels,
        s=side,
        p=getattr(model, "patch_size", 0),
        r=registers,
        first=1 + registers,
        images="a list of PIL images"
        if channels == 3
        else "a list of uint8 arrays [H,W,1]",
    )


def _input(backbone, letterbox: bool = False) -> str:
    side = backbone.image_size
    square = f"{side} x {side} pixels"
    if letterbox:
        square += ", its aspect kept, centred on black"
    mean, std = _numbers(backbone.mean), _numbers(backbone.std)
    return f"""Input: {backbone.channels} channel(s), the whole image resized to
{square} (bilinear), scaled to [0, 1], then (x - mean) / std with mean {mean}
and std {std}. At other sizes libraries interpolate positions in
different ways; the check below is at {side} pixels."""


def _checks(report: dict, agree: str) -> str:
    checked = report["target"]
    if checked.get("difference"):
        worst = max(checked["difference"].values())
        check = f"{agree} with {checked['library']} within {worst:.1e}."
    else:
        check = f"Not run in its target library: {checked['reason']}."
    return f"{check}\nLoaded back into ultradino_jax: {report['reload']['verdict']}."


def _evaluation(facts: dict) -> str:
    """Figures of the evaluation that trained a model, as a table."""
    if not facts:
        return "No results were found beside the model."
    rows = [("data set", facts["dataset"]), ("method", facts["method"])]
    rows += [("row, seed", f"{facts['row']}, {facts['seed']}")]
    rows += [("validation", f"{facts['validation']:.4f}")]
    rows += [(f"test {k}", f"{v:.4f}") for k, v in facts["figures"].items()]
    return _table(rows)


def _numbers(values) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _training(facts: dict) -> str:
    if not facts:
        return "No training run was found beside the checkpoint."
    config = facts["config"]
    data, crops = config["data"], config["crops"]
    where = "images" if data["root"] else "rendered phantom images, no patient data"
    rows = [
        ("training images", f"{facts.get('images', 'unknown')} ({where})"),
        ("optimiser steps", facts["step"]),
        ("images per step", config["batch_size"]),
        ("augmentation style", crops["style"]),
        ("global crop", f"{crops['global_size']} px"),
        ("prototypes", config["head"]["num_prototypes"]),
    ]
    rows += [
        (f"{name} at step {facts['metrics']['step']}", f"{value:.4f}")
        for name, value in facts.get("metrics", {}).items()
        if name != "step"
    ]
    return _table(rows)


def _table(rows) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"| | |\n|---|---|\n{table}"
