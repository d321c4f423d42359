# Pictures and measurements beside the scores.

rule grid:
    input: lambda wildcards: drawn(wildcards).sample_files
    output: report(f"{plan.root}/samples/{{draw}}/grid.png", category="Samples", labels={"samples": "{draw}"})
    log: log_of("grid-{draw}")
    benchmark: time_of("grid-{draw}")
    shell: "haste grid {wildcards.draw:q} -c {CONFIG:q} > {log:q} 2>&1"
