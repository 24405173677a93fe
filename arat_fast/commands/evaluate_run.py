"""What `arat-fast evaluate` does once its options are read: attack, print, write the record."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from arat_fast.analysis.labels import description
from arat_fast.commands.evaluate import EvaluateOptions
from arat_fast.commands.table import accuracy_table
from arat_fast.evaluation.network import load_run
from arat_fast.evaluation.options import EvaluationOptions
from arat_fast.evaluation.record import write_json
from arat_fast.evaluation.results import evaluate_run
from arat_fast.evaluation.sanity import sanity_checks
from arat_fast.loaders import sources
from arat_fast.training.build import pick_device, use_threads
from arat_fast.training.directory import RunDirectory

log = logging.getLogger(__name__)
SANITY_IMAGES = 200  # of `--sanity` without --limit


def look_for_masking(options: EvaluateOptions) -> int:
    """Print the four checks of `--sanity`; returns the exit code."""
    device = pick_device(options.device)
    trained = load_run(options.run, device, options.weights)
    _, test = sources.load(
        trained.config.dataset, options.data_root or trained.config.data_root, trained.config.image_size
    )
    use_threads(trained.config.threads)
    settings = trained.config.evaluation
    checks = sanity_checks(
        trained.network,
        test.first(options.limit or SANITY_IMAGES),
        eps=settings.eps if options.eps is None else options.eps,
        alpha=settings.alpha if options.alpha is None else options.alpha,
        norm=settings.norm,
        device=device,
        progress=lambda name: log.info("checking: %s", name),
    )
    for check in checks:
        print(f"{'pass   ' if check.passed else 'WARNING'}  {check.name}: {check.figures}")
    if not all(check.passed for check in checks):
        print("A warning: the attack may be failing rather than the network resisting; see its figures.")
    if options.json is not None:
        write_json(options.json, [check.as_json() for check in checks])
    return 0


def measure(options: EvaluateOptions, attacks: Sequence[str], how: EvaluationOptions) -> int:
    """Measure, print and, where asked, write the record; returns the exit code."""
    directory = RunDirectory(options.run)
    config = directory.config()
    directory.check_network()  # before any data is looked for
    use_threads(config.threads)
    _, test = sources.load(config.dataset, options.data_root or config.data_root, config.image_size)
    record = evaluate_run(options.run, test, attacks, device=pick_device(options.device), options=how)
    print(accuracy_table({description(config): record}))
    if options.json is not None:
        write_json(options.json, record)
        print(f"record: {options.json}")
    return 0
