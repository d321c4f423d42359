# One page, and its tables as files. `snakemake --report` also shows everything marked with report(...), with its own
# statistics of jobs and times.

rule report:
    input: plan.shown, plan.measure_files
    output:
        report(plan.report, category="Report", labels={"page": plan.config.name}),
        plan.report_made,
    log: log_of("report")
    shell: "haste report -c {CONFIG:q} > {log:q} 2>&1"
