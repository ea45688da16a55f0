"""What a run measures of its model on the way: perplexity in full and on a sample of the text, and samples of what it writes."""

from typing import Any

from losa import evaluate, generation, model, sharding
from losa.blocks import Subject
from losa.errors import LosaError
from losa.inputs import Inputs
from losa.recipe import Recipe
from losa.run import Run


def measure(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> dict[str, Any]:
    """Perplexity on the evaluation text, None without one; on the sample of it that steps are measured on; how many tokens
    were read, and how many at once."""
    if inputs.evaluation is None:
        return {"perplexity": None, "sample_perplexity": None, "tokens": 0, "window": None}
    with run.phase("perplexity"), sharding.spread(subject, recipe) as whole:
        window = model.reading_window(subject.model.config, recipe.eval_window)
        found = evaluate.perplexity(whole, inputs.evaluation, window, progress=run.progress)
    same = recipe.eval_step_tokens >= len(inputs.evaluation)
    part = found if same else measure_step(subject, recipe, inputs, None, run)
    count = evaluate.whole_windows(inputs.evaluation, window).numel()
    return {"perplexity": found, "sample_perplexity": part, "tokens": count, "window": window}


def measure_step(subject: Subject, recipe: Recipe, inputs: Inputs, step: int | None, run: Run) -> float | None:
    """Perplexity on a sample of the evaluation text; None without one, or if the recipe does not ask for it."""
    if inputs.evaluation is None or not recipe.eval_step_tokens:
        return None
    window = model.reading_window(subject.model.config, recipe.eval_window)
    tokens = evaluate.spread(inputs.evaluation, window, recipe.eval_step_tokens)
    with run.phase("perplexity", step), sharding.spread(subject, recipe) as whole:
        return evaluate.perplexity(whole, tokens, min(window, len(tokens)), progress=run.progress)


def sample(subject: Subject, recipe: Recipe, inputs: Inputs, which: str, run: Run) -> None:
    """Log how the model (`which`: dense, sparse ...) continues the prompts; the report shows them side by side.

    Drawn with a seed, not the likeliest: small models soon repeat those. Raises LosaError if the model cannot generate.
    """
    if not (inputs.prompts and run.writes):
        return
    longest, texts = model.longest_text(subject.model.config), []
    with run.phase("samples"):
        for prompt in inputs.prompts:
            encoded = subject.tokenizer(prompt, return_tensors="pt")
            tokens = int(min(recipe.sample_tokens, longest - encoded["input_ids"].shape[1]))
            try:
                made = generation.continued(
                    subject.model, subject.tokenizer, encoded, tokens, recipe.seed, **generation.SEEDED
                )
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                raise LosaError(
                    f"the model cannot continue a prompt ({error}); --sample-tokens 0 asks it not to"
                ) from error
            texts.append(str(subject.tokenizer.decode(made, skip_special_tokens=True)))
    run.log("samples", model=which, prompts=inputs.prompts, texts=texts)
