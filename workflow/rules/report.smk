# One page, and its tables as files.

rule report:
    input:
        [row.evaluation.score for row in plan.rows],
        [row.evaluation.grid for row in plan.rows],
        plan.floor,
    output: plan.report
    log: log_of("report")
    shell: "haste report -c {CONFIG} > {log} 2>&1"
