# One page, and its tables as files.

rule report:
    input: plan.shown
    output: plan.report, plan.report_made
    log: log_of("report")
    shell: "haste report -c {CONFIG:q} > {log:q} 2>&1"
