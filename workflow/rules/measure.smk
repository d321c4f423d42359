# Diagnostics of states other than their scores: one rule for all measures, by the name of the measurement.

MEASURE = f"{plan.root}/measures/{{state}}/{{what}}.json"

rule measure:
    input: needed("measure", MEASURE)
    output: update(MEASURE)
    log: log_of("measure-{state}-{what}")
    benchmark: time_of("measure-{state}-{what}")
    threads: THREADS
    resources: devices=1
    params: label=named("measure", MEASURE)
    shell: "haste measure {params.label:q} {wildcards.state:q}/{wildcards.what:q} -c {CONFIG:q} > {log:q} 2>&1"


rule measures:
    input: plan.measure_files


localrules: measures
