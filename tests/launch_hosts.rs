//! The plan of a run on several hosts: who is where, and what each worker is told.

use pdlink::config::{Config, KvConnector, NodeConfig, Role};
use pdlink::launcher::nodes::ports::CountedPorts;
use pdlink::topology::vllm::VllmProgram;
use pdlink::topology::{Place, Plan, Surroundings, plan};
use serde_json::Value;

fn config() -> Config {
    let node = |address: &str, prefill: &[u32], decode: &[u32]| NodeConfig {
        address: Some(address.to_owned()),
        prefill_gpu_ids: prefill.to_vec(),
        decode_gpu_ids: decode.to_vec(),
        ..NodeConfig::default()
    };
    let mut config = Config::default();
    config.inference.model.name = Some("M".to_owned());
    config.pd_disagg.enabled = true;
    config.pd_disagg.prefill_tp = Some(2);
    config.pd_disagg.kv_connector = KvConnector::NixlConnector;
    config.hosts.nodes = vec![node("10.0.0.1", &[0, 1], &[]), node("10.0.0.2", &[0, 1], &[2, 3])];
    config
}

fn planned(config: &Config, place: &Place) -> Plan {
    let vllm = VllmProgram::new(vec!["vllm".to_owned()], "0.33.0");
    let around = Surroundings { pdlink: "pdlink", vllm: vllm.as_ref(), cores: &[], secret_file: "secret", place };
    plan(config, &around, &mut CountedPorts::default()).expect("a plan")
}

fn place() -> Place {
    let rdma = [(0, vec!["mlx5_0:1".to_owned()]), (1, vec!["mlx5_1:1".to_owned()]), (2, vec!["mlx5_2:1".to_owned()])];
    let (kv_address, kv_interface) = (Some("10.1.0.2".to_owned()), Some("ib0".to_owned()));
    Place { node: 1, kv_address, kv_interface, rdma: rdma.into(), ..Place::default() }
}

fn kv_settings(plan: &Plan, name: &str) -> Value {
    let worker = plan.workers.iter().find(|worker| worker.name() == name).expect(name);
    let at = worker.command.iter().position(|word| word == "--kv-transfer-config").expect("the flag");
    worker.command[at + 1].parse().expect("JSON")
}

#[test]
fn every_worker_is_on_one_host_and_bound_there() {
    let plan = planned(&config(), &place());
    let told: Vec<_> = plan.workers.iter().map(|worker| (worker.name(), worker.node, worker.url())).collect();
    assert_eq!(
        told,
        [
            ("prefill_0".to_owned(), 0, "http://10.0.0.1:8100".to_owned()),
            ("prefill_1".to_owned(), 1, "http://10.0.0.2:8101".to_owned()),
            ("decode_0".to_owned(), 1, "http://10.0.0.2:8200".to_owned()),
            ("decode_1".to_owned(), 1, "http://10.0.0.2:8201".to_owned()),
        ]
    );
    let share = plan.share(1);
    assert_eq!((share.workers.len(), share.of_role(Role::Prefill).count(), share.nodes.len()), (3, 1, 2));
    for (at, worker) in plan.workers.iter().enumerate() {
        let settings = kv_settings(&plan, &worker.name());
        assert_eq!(settings["kv_connector_extra_config"]["kv_rank"], at, "ranks count over all nodes");
        assert!(worker.command.windows(2).any(|words| words == ["--host", worker.host.as_str()]));
        assert_eq!(worker.env["PDLINK_HOST"], format!("node {} at {}", worker.node, worker.host));
    }
    assert_eq!(plan.workers[1].env["CUDA_VISIBLE_DEVICES"], "0,1");
}

#[test]
fn kv_takes_its_own_network_and_the_devices_next_to_the_gpus() {
    let mut config = config();
    let plan = planned(&config, &place());
    assert_eq!(kv_settings(&plan, "prefill_1")["kv_connector_extra_config"]["kv_host"], "10.1.0.2");
    assert_eq!(
        kv_settings(&plan, "prefill_0")["kv_connector_extra_config"]["kv_host"],
        "10.0.0.1",
        "known there alone"
    );
    assert!(plan.workers[2].kv_address().expect("one").starts_with("10.1.0.2:"));
    assert_eq!(plan.workers[1].env["UCX_NET_DEVICES"], "mlx5_0:1,mlx5_1:1,ib0");
    assert_eq!(plan.workers[2].env["UCX_NET_DEVICES"], "mlx5_2:1,ib0");
    assert!(!plan.workers[1].env.contains_key("NCCL_IB_HCA"), "nccl is no path here");

    config.hosts.nodes[0].kv_address = Some("10.1.0.1".to_owned());
    config.kv.nixl.env.insert("UCX_NET_DEVICES".to_owned(), "mine".to_owned());
    config.pd_disagg.kv_connector = KvConnector::P2pNcclConnector;
    config.pd_disagg.decode_env.insert("NCCL_IB_HCA".to_owned(), "mine".to_owned());
    let plan = planned(&config, &place());
    assert_eq!(kv_settings(&plan, "prefill_0")["kv_connector_extra_config"]["kv_host"], "10.1.0.1");
    let env = |at: usize, name: &str| plan.workers[at].env.get(name).map(String::as_str);
    assert_eq!((env(1, "NCCL_IB_HCA"), env(1, "NCCL_SOCKET_IFNAME")), (Some("=mlx5_0:1,mlx5_1:1"), Some("=ib0")));
    assert_eq!((env(2, "NCCL_IB_HCA"), env(1, "UCX_NET_DEVICES")), (Some("mine"), None), "the user's word stands");
    config.pd_disagg.kv_connector = KvConnector::NixlConnector;
    assert_eq!(planned(&config, &place()).workers[1].env["UCX_NET_DEVICES"], "mine");
}
