"""What else is asked of a sparse model: fewer bits, and questions it was not trained for."""

from typing import Any

from experiments.cast_llama.config import LABELS, PROJECTIONS, Config
from experiments.cast_llama.trials import Trial, mean_after
from experiments.harness.language import LanguageModel
from experiments.harness.multiple_choice import Question, evaluate, read_questions
from experiments.harness.perplexity import Perplexity
from experiments.harness.progress import make_table
from experiments.harness.run import Run
from sparsejax import weights


def chosen_trial(best: dict[str, list[Trial]]) -> Trial | None:
    """The sparse model that is stored: CAST's best seed, or that of the best method."""
    sparse = {name: found for name, found in best.items() if name != "dense"}
    if not sparse:
        return None
    found = sparse.get("cast") or min(sparse.values(), key=mean_after)
    return min(found, key=lambda trial: trial.after)


def measure_quantized(
    config: Config, run: Run, chosen: Trial, perplexity: Perplexity, windows: Any
) -> dict[str, dict[str, float]]:
    """Perplexity and stored bytes of the sparse model with its projections rounded."""
    found = {}
    for bits in config.bits:
        params, sizes = weights.quantize_params(
            chosen.params,
            chosen.masks,
            bits=bits,  # type: ignore[arg-type]
            group=config.quantize_group,
            where=PROJECTIONS,
        )
        after = perplexity(params, windows)
        run.show(
            f"{LABELS[chosen.method]} in int{bits}, groups of {config.quantize_group}: perplexity "
            f"{after:.3f} ({after - chosen.after:+.3f}), {sizes['stored']:,} bytes of "
            f"{sizes['dense']:,}"
        )
        found[f"int{bits}"] = {"perplexity": after, **sizes}
    return found


def load_questions(config: Config) -> dict[str, list[Question]]:
    """The questions of every file, before anything is trained. Raises DatasetError."""
    found = {}
    for given in config.questions:
        layout, _, path = given.partition("=")
        found[given] = read_questions(path, layout)
    return found


def answer_questions(
    config: Config,
    run: Run,
    model: LanguageModel,
    best: dict[str, list[Trial]],
    questions: dict[str, list[Question]],
) -> dict[str, dict[str, tuple[float, float]]]:
    """Accuracy of the dense model and of every method's first seed, plain and length-normalised."""
    if not questions:
        return {}
    models = {"dense (start)": model.params}
    models |= {LABELS[name]: found[0].params for name, found in best.items()}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for given, asked in questions.items():
        for name, params in models.items():
            result = evaluate(
                model.logits, params, model.tokenizer, asked, max_length=model.config.max_seq_len
            )
            found.setdefault(name, {})[given] = (result.acc, result.acc_norm)
    header = ("model", *(given.partition("=")[0] for given in questions))
    rows = [
        (name, *(f"{plain:.3f} / {normed:.3f}" for plain, normed in row.values()))
        for name, row in found.items()
    ]
    counts = ", ".join(f"{len(asked)}" for asked in questions.values())
    title = f"Accuracy without training, plain / length-normalised ({counts} questions)"
    run.console.print(make_table(title, header, rows))
    return found
