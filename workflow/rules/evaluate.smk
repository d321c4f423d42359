# Samples and their features in one job, then their scores. States are ancient() here too: their names identify them.
import re

PARTS = [path for detector in plan.detectors.values() if detector.part for path in detector.part.files]
SCORE, FLOOR = f"{plan.root}/scores/{{draw}}.{{key}}.json", f"{plan.root}/scores/floor-{{key}}.json"
SAMPLES = f"{plan.root}/samples/{{draw}}/shard-{{shard}}-of-{{shards}}.npz"
FEATURES = f"{plan.root}/features/{{draw}}/{{seen}}/shard-{{shard}}-of-{{shards}}.h5"
GRID = f"{plan.root}/samples/{{draw}}/grid.png"


def drawn(wildcards):
    return plan.evaluations[wildcards.draw]


def judgement(wildcards):
    """One detector's judgement of a set of samples, by the score's name."""
    return next(one for one in drawn(wildcards).judgements if one.score == SCORE.format(**dict(wildcards.items())))


def seen(wildcards):
    """The detector of a folder of features."""
    return next(one for one in plan.detectors.values() if one.looks == wildcards.seen)


def floor_of(wildcards):
    return next(one for one in plan.detectors.values() if one.floor == FLOOR.format(key=wildcards.key))


# All detectors run in one job; those that already have features of the same images are left out.
REFERENCES = plan.references_missing or (plan.references if HERE else [])

rule reference:
    input: needed(REFERENCES, plan.images.files, PARTS)
    output: [update(path) for path in REFERENCES]
    log: log_of("reference")
    benchmark: time_of("reference")
    threads: THREADS
    resources: devices=1
    shell: "haste reference -c {CONFIG:q} > {log:q} 2>&1"


# There are two ways to the same features, so each set of samples has only one. New samples get features in the same
# job; for existing samples a detector added later runs alone, and nothing is drawn again. What is on disk when
# Snakemake starts decides between them. A job on a node reads these lines again, and once more after a node failure,
# when more is on disk: there nothing is decided.
DRAWN, TO_DRAW = (
    [re.escape(name) for name, one in plan.evaluations.items() if not HERE or one.is_drawn == there]
    for there in (True, False)
)

if TO_DRAW:
    SEEN = [FEATURES.replace("{seen}", detector.looks) for detector in plan.detectors.values()]

    rule sample:
        input: needed([SAMPLES, *SEEN], lambda wildcards: plan.drawn_from(drawn(wildcards)), PARTS)
        output:
            samples=update(SAMPLES),
            features=[update(path) for path in SEEN],
        log: log_of("sample-{draw}-{shard}-of-{shards}")
        benchmark: time_of("sample-{draw}-{shard}-of-{shards}")
        threads: THREADS
        resources: devices=1
        wildcard_constraints: draw="|".join(TO_DRAW)
        shell: "haste sample {wildcards.draw:q} --shard $((10#{wildcards.shard})) -c {CONFIG:q} > {log:q} 2>&1"


if DRAWN:

    rule features:
        input:
            needed(
                FEATURES,
                lambda wildcards: [drawn(wildcards).sample_file(int(wildcards.shard)), *plan.meant_from],
                lambda wildcards: seen(wildcards).part.files if seen(wildcards).part else [],
            )
        output: update(FEATURES)
        log: log_of("features-{draw}-{seen}-{shard}-of-{shards}")
        benchmark: time_of("features-{draw}-{seen}-{shard}-of-{shards}")
        threads: THREADS
        resources: devices=1
        wildcard_constraints: draw="|".join(DRAWN), seen="[^/]+"
        params: name=lambda wildcards: seen(wildcards).name, shard=lambda wildcards: int(wildcards.shard)
        shell:
            "haste features {wildcards.draw:q} --detector {params.name:q} --shard {params.shard} -c {CONFIG:q} "
            "> {log:q} 2>&1"


rule score:
    input:
        needed(
            SCORE,
            lambda wildcards: [judgement(wildcards).detector.reference.manifest],
            lambda wildcards: judgement(wildcards).features.shard_files,
        )
    output: update(SCORE)
    log: log_of("score-{draw}.{key}")
    benchmark: time_of("score-{draw}.{key}")
    resources: devices=1
    params: name=lambda wildcards: judgement(wildcards).detector.name
    shell: "haste evaluate {wildcards.draw:q} --detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule floor:
    input:
        needed(
            FLOOR,
            lambda wildcards: [floor_of(wildcards).reference.manifest],
            lambda wildcards: floor_of(wildcards).part.files if floor_of(wildcards).part else [],
        )
    output: update(FLOOR)
    log: log_of("floor-{key}")
    benchmark: time_of("floor-{key}")
    resources: devices=1
    params: name=lambda wildcards: floor_of(wildcards).name
    shell: "haste floor --detector {params.name:q} -c {CONFIG:q} > {log:q} 2>&1"


rule grid:
    input: needed(GRID, lambda wildcards: drawn(wildcards).sample_files)
    output: update(report(GRID, category="Samples", labels={"samples": "{draw}"}))
    log: log_of("grid-{draw}")
    benchmark: time_of("grid-{draw}")
    shell: "haste grid {wildcards.draw:q} -c {CONFIG:q} > {log:q} 2>&1"
