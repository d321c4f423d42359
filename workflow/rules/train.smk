# A state from the state before it. Every edge is ancient(): nothing is ever trained again because a file was touched.


def before(wildcards):
    """What a segment starts from: the parent state, the latents and, while it aligns, images and teachers
    or their targets on disk.

    A finished state starts from nothing: else a milestone put in before it, which then is its parent, would be a
    reason to make it again (ancient() holds only for files that exist).
    """
    state = State(wildcards.trajectory, int(wildcards.step))
    if state.step in plan.on_disk(state.trajectory):
        return []
    segment = plan.segment(state)
    files = [plan.latents.manifest]
    if segment.parent:
        files.append(plan.path(segment.parent))
    if segment.after:
        files.append(plan.path(segment.after))
    files += [plan.targets[name].manifest for name in segment.targets]
    if segment.teachers:
        files.append(plan.images.manifest)
        files += [plan.teachers[name].manifest for name in segment.teachers if plan.teachers[name]]
    return files


rule train:
    input: ancient(before)
    output: f"{plan.root}/states/{{trajectory}}/step-{{step}}.safetensors"
    log: log_of("train-{trajectory}-{step}")
    benchmark: time_of("train-{trajectory}-{step}")
    threads: TRAIN_THREADS
    priority: 10  # what others wait for goes first
    shell: "haste train {wildcards.trajectory:q}/{wildcards.step} -c {CONFIG:q} > {log:q} 2>&1"
