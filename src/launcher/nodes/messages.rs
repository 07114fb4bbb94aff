//! What nodes say to each other. It travels in notices of the control connection.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Config;
use crate::launcher::metrics::Life;
use crate::topology::{Plan, WorkerPlan};

/// Which pdlink this is.
pub const BUILD: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("PDLINK_COMMIT"), ")");

/// Who a node is, in its hello.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeCard {
    /// [`BUILD`]: all nodes of a run have the same.
    pub build: String,
    pub rank: usize,
    /// What the run is, line by line, as this node's configuration has it.
    pub shape: Vec<String>,
}

/// Where one worker listens, as its own node knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// `prefill_0`
    pub worker: String,
    pub reach: String,
    pub kv_reach: String,
    pub port: u16,
    pub kv_ports: Vec<u16>,
    pub weights_ports: Vec<u16>,
    pub serves: bool,
}

/// From a node to node 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeSays {
    /// Its workers, and the ports it took, by purpose, so that it can be given the same when it comes back.
    Share { seats: Vec<Seat>, ports: Vec<(String, u16)> },
    /// A worker serves, or is away.
    Worker { worker: String, serves: bool, why: String },
    /// What node 0 counts of a worker's life.
    Life { worker: String, life: Life },
    /// A worker was given up, or the node cannot start what it should: the node ends.
    Failed { why: String },
    /// Somebody asked this node to end.
    Leaving { by: String },
}

/// From node 0 to a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node0Says {
    /// The ports it had when it was here last, by purpose; none at first.
    Welcome { ports: Vec<(String, u16)> },
    /// It cannot take part. With `again` it may be tried later.
    Refused { why: String, again: bool },
    /// The proxy takes requests.
    Ready { base_url: String },
    /// No request of the node that leaves is in flight any more.
    Drained,
    /// The run ends.
    End { why: String, failed: bool },
}

/// What a plan and its settings are, as far as all nodes must agree.
pub fn shape(plan: &Plan, config: &Config) -> Vec<String> {
    let mut lines = vec![format!("model {}", plan.model), format!("{} nodes", plan.nodes.len())];
    lines.extend(plan.nodes.iter().map(|node| format!("node {} at {}", node.rank, node.address)));
    if let Some(link) = &plan.link {
        let (connector, by) = (link.connector.name(), link.connector_impl.name());
        lines.push(format!("KV by {connector} ({by}, {})", link.send_type.name()));
    }
    let worker = |worker: &WorkerPlan| {
        let (engine, gpus) = (worker.engine.name(), worker.gpus.as_slice());
        format!("{} ({engine}) on node {} with GPUs {gpus:?}", worker.name(), worker.node)
    };
    lines.extend(plan.workers.iter().map(worker));
    settings("kv", serde_json::to_value(&config.kv).unwrap_or_default(), &mut lines);
    settings("weights", serde_json::to_value(&config.weights).unwrap_or_default(), &mut lines);
    lines
}

/// Keys whose values may be others on each host: where its libraries are, and what its devices are called.
const OF_A_HOST: [&str; 4] = ["library", "environment", "env", "parameters"];

/// One line for each key.
fn settings(section: &str, value: Value, lines: &mut Vec<String>) {
    let Value::Object(keys) = value else { return lines.push(format!("{section} = {value}")) };
    for (key, value) in keys.into_iter().filter(|(key, _)| !OF_A_HOST.contains(&key.as_str())) {
        settings(&format!("{section}.{key}"), value, lines);
    }
}

/// Where the workers of a share listen.
pub fn seats(share: &Plan, serves: &dyn Fn(&WorkerPlan) -> bool) -> Vec<Seat> {
    let seat = |worker: &WorkerPlan| Seat {
        worker: worker.name(),
        reach: worker.reach.clone(),
        kv_reach: worker.kv_reach.clone(),
        port: worker.port,
        kv_ports: worker.kv_ports.clone(),
        weights_ports: worker.weights_ports.clone(),
        serves: serves(worker),
    };
    share.workers.iter().map(seat).collect()
}

/// Writes into the plan where a worker of another node really listens.
pub fn seat_in(plan: &mut Plan, seat: &Seat) {
    if let Some(worker) = plan.workers.iter_mut().find(|worker| worker.name() == seat.worker) {
        worker.reach.clone_from(&seat.reach);
        worker.kv_reach.clone_from(&seat.kv_reach);
        worker.port = seat.port;
        worker.kv_port = seat.kv_ports.first().copied();
        worker.kv_ports.clone_from(&seat.kv_ports);
        worker.weights_ports.clone_from(&seat.weights_ports);
    }
}
