"""The schema of a configuration, and the published names of models and teachers. No torch.

A configuration is a mapping (YAML or JSON). `resolve` checks all of it before anything runs: an unknown key, a layer
that a model does not have, or an undefined name is a `ValueError` that says where, what was found and what
was expected. `config/README.md` explains every key.

Each file imports only from those above it:

    keys        building blocks of sections: `Strict`, kinds of numbers, and the marks that keep a key out of names
    parts       sections on images and networks: autoencoder, teachers, detectors, models
    schema      sections on alignment, training, sampling and runs, and the whole: `Config`
    published   sizes, layers and depths of the papers, and definitions of predefined names
    derived     consequences: terms with their layers, when they fall and stop, taps and cost of models
    faults      error messages about a configuration
    forks       the rows that forks of a run stand for
    reading     from a file or a mapping to a `Config`
"""

from haste.config.derived import (
    condition_arguments,
    condition_entry,
    condition_in,
    facts_in,
    facts_of_other,
    falls_from,
    measured_beside,
    measured_teacher,
    measured_terms,
    model_entry,
    model_in,
    process_in,
    taps_of,
    terms_of,
    training_elsewhere,
    training_entry,
    triggers_of,
)
from haste.config.faults import check_samplers
from haste.config.forks import Branch, branches, written
from haste.config.keys import LABEL, LATER, Float, Positive, Rate, Seed, Share, Strict, decides, number
from haste.config.parts import (
    DENOISERS,
    EVALUATION,
    MEASURES,
    Autoencoder,
    Cache,
    Detector,
    Images,
    Model,
    OtherModel,
    Teacher,
    architecture_named,
    measure_named,
)
from haste.config.published import (
    ALIGNED_HEADS,
    MAPPINGS,
    MODELS,
    REPA_DEPTH,
    SIZES,
    alignment_named,
    filter_faults,
    layer_faults,
    model_named,
    teacher_shape,
    teacher_tokens,
)
from haste.config.reading import load, of_workflow, read, resolve, submitted
from haste.config.schema import (
    PRESETS,
    TERMS,
    Alignment,
    AttentionTerm,
    Config,
    Evaluate,
    FeatureTerm,
    Fork,
    Measure,
    Ramps,
    Run,
    Runtime,
    Sampling,
    Stops,
    Timesteps,
    Training,
    Trigger,
    minutes_of,
)
from haste.config.words import explain
from haste.networks.registry import DETECTORS, TEACHERS
