//! A batch script for Slurm: `pdlink up` on each node of the job, under one `srun`.

use super::shape::nodes;
use super::shell::quoted;
use super::{RenderError, configuration, refuse_role_secrets, refuse_secrets};
use crate::config::{Config, SlurmConfig};

/// Ends the configuration inside the script.
const END: &str = "PDLINK_CONFIGURATION";
const MEND: &str = "set it where you call sbatch, which passes its own environment on";

/// The script for `sbatch`.
pub fn script(config: &Config) -> Result<String, RenderError> {
    let slurm = &config.slurm;
    refuse_role_secrets(config, MEND)?;
    refuse_secrets("slurm.env", slurm.env.keys(), MEND)?;
    let nodes = nodes(config);
    let gpus = slurm.gpus_per_node.or_else(|| nodes.iter().map(|node| node.gpus).max()).unwrap_or_default();
    let toml = configuration(config, |_| {})?;
    if toml.lines().any(|line| line == END) {
        return Err(RenderError::Toml(format!("it has a line {END}")));
    }
    let mut script = String::from("#!/usr/bin/env bash\n");
    for option in options(slurm, nodes.len(), gpus)? {
        script.push_str(&format!("#SBATCH {option}\n"));
    }
    script.push_str(PREPARE);
    script.push_str(&format!("cat > \"$run/pdlink.toml\" <<'{END}'\n{toml}{END}\n"));
    for (name, value) in &slurm.env {
        script.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    for line in &slurm.setup {
        script.push_str(&format!("{line}\n"));
    }
    script.push_str(&run(slurm, config.hosts.is_given()));
    Ok(script)
}

/// A folder on the file system that all nodes share, with what all of them must have alike.
const PREPARE: &str = r#"set -euo pipefail
umask 077
# Made anew for each job, in the folder from which it was submitted: all nodes must see it.
run="${SLURM_SUBMIT_DIR:-$PWD}/pdlink-${SLURM_JOB_ID}"
mkdir -p "$run"
trap 'rm -rf "$run"' EXIT
# The secret that the parts of this run know each other by.
od -An -tx1 -N32 /dev/urandom | tr -d ' \n' > "$run/secret"
"#;

fn options(slurm: &SlurmConfig, nodes: usize, gpus: u32) -> Result<Vec<String>, RenderError> {
    let mut options = vec![format!("--nodes={nodes}"), "--ntasks-per-node=1".to_owned()];
    let named = [
        ("slurm.job_name", "--job-name", Some(&slurm.job_name)),
        ("slurm.partition", "--partition", slurm.partition.as_ref()),
        ("slurm.account", "--account", slurm.account.as_ref()),
        ("slurm.qos", "--qos", slurm.qos.as_ref()),
        ("slurm.time", "--time", slurm.time.as_ref()),
        ("slurm.memory", "--mem", slurm.memory.as_ref()),
    ];
    for (key, option, value) in named {
        let Some(value) = value else { continue };
        options.push(format!("{option}={}", in_head(key, value)?));
    }
    if gpus > 0 {
        options.push(format!("--gres=gpu:{gpus}"));
    }
    if let Some(cpus) = slurm.cpus_per_task {
        options.push(format!("--cpus-per-task={cpus}"));
    }
    if slurm.exclusive {
        options.push("--exclusive".to_owned());
    }
    options.push("--output=pdlink-%j.log".to_owned());
    for option in &slurm.options {
        options.push(in_head("slurm.options", option)?.to_owned());
    }
    Ok(options)
}

/// sbatch reads its head without a shell.
fn in_head<'a>(key: &'static str, value: &'a str) -> Result<&'a str, RenderError> {
    let bad = value.is_empty() || value.contains(['\n', '\r', '"', '\'']);
    if bad { Err(RenderError::Unwritable { key, value: value.to_owned() }) } else { Ok(value) }
}

/// The step that runs. Nodes that are named are told their number and everybody's names; a run without any needs neither.
fn run(slurm: &SlurmConfig, has_nodes: bool) -> String {
    // A task that fails ends the others: `pdlink up` has decided by then that the run cannot go on.
    let mut srun = vec!["srun".to_owned(), "--kill-on-bad-exit=1".to_owned()];
    if let Some(image) = &slurm.container_image {
        let mounts: Vec<&str> = slurm.container_mounts.iter().map(String::as_str).collect();
        let mounts = [&["$run:$run"], mounts.as_slice()].concat().join(",");
        srun.push(format!("--container-image={}", quoted(image)));
        srun.push(format!("--container-mounts=\"{mounts}\""));
        // Else what the image has set would hide the job's own variables.
        let names: Vec<&str> = slurm.env.keys().map(String::as_str).collect();
        if !names.is_empty() {
            srun.push(format!("--container-env={}", names.join(",")));
        }
    }
    let up = format!("exec {} up @ \"$0/pdlink.toml\" --security.secret_file \"$0/secret\"", quoted(&slurm.pdlink));
    let (prepare, up, words) = match has_nodes {
        false => (String::new(), up, "\"$run\""),
        true => (
            "addresses=\"[$(scontrol show hostnames \"$SLURM_JOB_NODELIST\" | sed 's/.*/\"&\"/' | paste -sd,)]\"\n"
                .to_owned(),
            format!("{up} --node \"$SLURM_NODEID\" --hosts.addresses \"$1\""),
            "\"$run\" \"$addresses\"",
        ),
    };
    format!("{prepare}{} bash -c {} {words}\n", srun.join(" "), quoted(&up))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_one_line() {
        assert!(in_head("slurm.options", "--x\n#SBATCH --y").is_err() && in_head("slurm.options", "").is_err());
    }
}
