//! `[slurm]`: what `pdlink render slurm` writes at the head of a batch script.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A job of Slurm's that runs `pdlink up` on each of its nodes. What is not given here is left to the cluster's defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SlurmConfig {
    /// Name of the job. Default `pdlink`.
    pub job_name: String,
    /// Partition, or several with commas between.
    pub partition: Option<String>,
    /// Account that is charged.
    pub account: Option<String>,
    /// Quality of service.
    pub qos: Option<String>,
    /// Longest time, as Slurm writes it: `12:00:00`, `2-00:00:00`.
    pub time: Option<String>,
    /// GPUs of each node, as in `--gres=gpu:N`. Default: the highest GPU id of the configuration and one; none with the reference
    /// engine.
    pub gpus_per_node: Option<u32>,
    /// Processors for each node's task.
    #[schemars(range(min = 1))]
    pub cpus_per_task: Option<u32>,
    /// Memory of each node, as Slurm writes it: `200G`, or `0` for all of it.
    pub memory: Option<String>,
    /// Whether no other job may be on the nodes. Default true: links and GPUs would be shared.
    pub exclusive: bool,
    /// Container image for Pyxis (Enroot), as `srun --container-image` takes it: `nvcr.io#org/image:tag`, or the path of a squashfs
    /// file. Default none: the job runs as it is on the node.
    pub container_image: Option<String>,
    /// Mounts of the container, `/outside:/inside[:flags]`. The run's own folder is always mounted.
    pub container_mounts: Vec<String>,
    /// Variables of every node's `pdlink up`.
    pub env: BTreeMap<String, String>,
    /// Lines of shell before the run, on the first node: `module load cuda`, `source /path/venv/bin/activate`.
    pub setup: Vec<String>,
    /// Further options of sbatch, each as it is written: `--constraint=h200`.
    pub options: Vec<String>,
    /// The program on the nodes, or in the container. Default `pdlink`.
    pub pdlink: String,
}

impl Default for SlurmConfig {
    fn default() -> Self {
        Self {
            job_name: "pdlink".to_owned(),
            partition: None,
            account: None,
            qos: None,
            time: None,
            gpus_per_node: None,
            cpus_per_task: None,
            memory: None,
            exclusive: true,
            container_image: None,
            container_mounts: Vec::new(),
            env: BTreeMap::new(),
            setup: Vec::new(),
            options: Vec::new(),
            pdlink: "pdlink".to_owned(),
        }
    }
}
