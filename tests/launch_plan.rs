//! Configuration to plan, as tables: who runs where, with which command, environment and ports.

use std::collections::BTreeSet;

use pdlink::config::{All2AllBackend, Config, ConnectorImpl, EngineKind, KvConnector, KvSendType, Path, Role};
use pdlink::topology::host::{Gpus, Host, HostFault, ModelFault, doubts, faults};
use pdlink::topology::ports::{PortError, PortWish, Ports};
use pdlink::topology::vllm::{VllmProgram, Wheel};
use pdlink::topology::{Place, Plan, PlanError, Surroundings, WorkerPlan, plan};
use serde_json::{Value, json};

/// A host whose busy ports are a list.
#[derive(Default)]
struct TablePorts {
    busy: BTreeSet<u16>,
    chosen_by_system: u16,
}

impl TablePorts {
    fn busy(ports: &[u16]) -> Self {
        Self { busy: ports.iter().copied().collect(), chosen_by_system: 40_000 }
    }
}

impl Ports for TablePorts {
    fn take(&mut self, wish: PortWish<'_>) -> Result<u16, PortError> {
        let mut base = wish.base;
        if base == 0 {
            self.chosen_by_system += 1;
            return Ok(self.chosen_by_system);
        }
        while (base..base + wish.count).any(|port| self.busy.contains(&port)) {
            if !wish.search {
                let (purpose, key) = (wish.purpose.to_owned(), wish.key.to_owned());
                return Err(PortError::Taken { purpose, key, host: "127.0.0.1".to_owned(), port: base });
            }
            base += 1;
        }
        self.busy.extend(base..base + wish.count);
        Ok(base)
    }
}

fn pd(prefill: &[u32], decode: &[u32]) -> Config {
    let mut config = Config::default();
    config.pd_disagg.enabled = true;
    config.pd_disagg.prefill_gpu_ids = prefill.to_vec();
    config.pd_disagg.decode_gpu_ids = decode.to_vec();
    config.inference.model.name = Some("M".to_owned());
    config
}

fn made(config: &Config, minor: u32, ports: &mut TablePorts) -> Result<Plan, PlanError> {
    made_with(config, &vllm(&format!("0.{minor}.0")), &[], ports)
}

fn vllm(release: &str) -> VllmProgram {
    VllmProgram::new(vec!["/env/bin/vllm".to_owned()], release).expect("a version")
}

fn made_with(config: &Config, vllm: &VllmProgram, cores: &[u32], ports: &mut TablePorts) -> Result<Plan, PlanError> {
    let place = &Place::default();
    let around = Surroundings { pdlink: "/bin/pdlink", vllm: Some(vllm), cores, secret_file: "/run/x/secret", place };
    plan(config, &around, ports)
}

/// With vLLM's build for CPU.
fn planned_on_cpu(config: &Config, cores: u32) -> Plan {
    let cores: Vec<u32> = (0..cores).collect();
    made_with(config, &vllm("0.32.0+cpu"), &cores, &mut TablePorts::busy(&[])).expect("a plan")
}

fn planned(config: &Config, minor: u32) -> Plan {
    made(config, minor, &mut TablePorts::busy(&[])).expect("a plan")
}

/// The value behind a flag.
fn flag<'a>(worker: &'a WorkerPlan, name: &str) -> Option<&'a str> {
    let at = worker.command.iter().position(|word| word == name)?;
    worker.command.get(at + 1).map(String::as_str)
}

fn kv_settings(worker: &WorkerPlan) -> Value {
    let text = flag(worker, "--kv-transfer-config").expect("a KV transfer configuration");
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn each_run_of_tp_ids_is_one_worker() {
    type Case = (&'static [u32], u32, &'static [u32], u32, &'static [&'static [u32]]);
    let cases: &[Case] = &[
        (&[0], 1, &[1], 1, &[&[0], &[1]]),
        (&[0, 1, 2, 3], 2, &[4, 5], 1, &[&[0, 1], &[2, 3], &[4], &[5]]),
        (&[7, 3], 2, &[0, 1, 2, 4], 4, &[&[7, 3], &[0, 1, 2, 4]]),
    ];
    for (prefill, prefill_tp, decode, decode_tp, want) in cases {
        let mut config = pd(prefill, decode);
        config.pd_disagg.prefill_tp = Some(*prefill_tp);
        config.pd_disagg.decode_tp = Some(*decode_tp);
        let plan = planned(&config, 33);
        let gpus: Vec<&[u32]> = plan.workers.iter().map(|worker| worker.gpus.as_slice()).collect();
        assert_eq!(&gpus, want, "case: {prefill:?} by {prefill_tp}, {decode:?} by {decode_tp}");
        for worker in &plan.workers {
            let ids: Vec<String> = worker.gpus.iter().map(u32::to_string).collect();
            assert_eq!(worker.env["CUDA_VISIBLE_DEVICES"], ids.join(","));
            assert_eq!(flag(worker, "--tensor-parallel-size"), Some(ids.len().to_string().as_str()));
        }
    }
    let mut config = pd(&[0, 1, 2], &[3, 4]);
    config.inference.parallel.tp = 2;
    let error = made(&config, 33, &mut TablePorts::busy(&[])).expect_err("3 ids by 2");
    assert!(matches!(error, PlanError::GpuList { role: "prefill", count: 3, tp: 2 }) && error.is_configuration());
}

#[test]
fn ports_count_up_from_each_roles_base_and_make_way() {
    let ports = |plan: &Plan| plan.workers.iter().map(|worker| (worker.port, worker.kv_port)).collect::<Vec<_>>();
    let mut config = pd(&[0, 1], &[2]);
    let plan = planned(&config, 33);
    assert_eq!(plan.proxy.base_url(), "http://127.0.0.1:8000/v1");
    assert_eq!(ports(&plan), [(8100, Some(14579)), (8101, Some(14580)), (8200, Some(14581))]);
    assert_eq!(plan.workers[2].kv_address().as_deref(), Some("127.0.0.1:14581"));
    assert_eq!(plan.workers[2].url(), "http://127.0.0.1:8200");

    let plan = made(&config, 33, &mut TablePorts::busy(&[8000, 8100])).expect("others are free");
    assert_eq!((plan.proxy.port, ports(&plan)[0].0, ports(&plan)[1].0), (8001, 8101, 8102));

    config.pd_disagg.auto_ports = false;
    config.pd_disagg.decode_kv_port = 14600;
    let error = made(&config, 33, &mut TablePorts::busy(&[8101])).expect_err("8101 is taken");
    let text = error.to_string();
    assert!(text.contains("port 8101 (HTTP port of prefill 1)") && text.contains("pd_disagg.prefill_port"), "{text}");
    assert!(!error.is_configuration());
}

#[test]
fn fixed_kv_ports_stand_in_a_row_worker_after_worker() {
    let mut config = pd(&[0, 1, 2, 3], &[4, 5, 6]);
    config.pd_disagg.prefill_tp = Some(2);
    config.pd_disagg.decode_tp = Some(3);
    config.pd_disagg.decode_kv_port = 14600;
    let ports = |config: &Config, minor| {
        planned(config, minor).workers.iter().map(|worker| worker.kv_ports.clone()).collect::<Vec<_>>()
    };
    let searched = ports(&config, 33);
    assert_eq!((searched[0][0], searched[1][0], searched[2][0]), (14579, 14580, 14600));
    assert!(
        searched.iter().all(|ports| ports[1..].iter().all(|port| *port > 40_000)),
        "the system chooses: {searched:?}"
    );

    config.pd_disagg.auto_ports = false;
    let fixed = [vec![14579, 14580], vec![14581, 14582], vec![14600, 14601, 14602]];
    assert_eq!(ports(&config, 33), fixed);
    config.pd_disagg.connector_impl = ConnectorImpl::Vllm;
    assert_eq!(ports(&config, 23), fixed);
    config.pd_disagg.kv_connector = KvConnector::NixlConnector;
    assert_eq!(ports(&config, 33), [vec![14579], vec![14580], vec![14600]], "its side channel has one");
}

#[test]
fn hosts_are_bound_as_configured_and_reached_from_here() {
    let cases =
        [(None, "127.0.0.1", "http://127.0.0.1:8000/v1"), (Some("0.0.0.0"), "0.0.0.0", "http://127.0.0.1:8000/v1")];
    for (host, bound, base_url) in cases {
        let mut config = pd(&[0], &[1]);
        config.pd_disagg.host = host.map(str::to_owned);
        let plan = planned(&config, 33);
        assert_eq!(flag(&plan.workers[0], "--host"), Some(bound));
        assert_eq!(plan.proxy.base_url(), base_url);
        assert_eq!(plan.workers[0].url(), "http://127.0.0.1:8100");
    }
}

#[test]
fn native_connector_settings_are_accepted_by_every_version() {
    let mut config = pd(&[0, 1], &[2]);
    config.pd_disagg.prefill_tp = Some(2);
    config.kv.paths = Some(vec![Path::CudaIpc]);
    config.telemetry.log_level = "debug".to_owned();
    let want = |role: &str, rank: u32, kv_ports: Value, port: u16, policy: bool| {
        let mut want = json!({
            "kv_connector": "P2pNcclConnector",
            "kv_connector_module_path": "pdlink.vllm",
            "kv_role": role,
            "kv_port": kv_ports[0],
        });
        if policy {
            want["kv_load_failure_policy"] = json!("fail");
        }
        want["kv_connector_extra_config"] = json!({
            "kv_rank": rank,
            "kv_parallel_size": 2,
            "kv_host": "127.0.0.1",
            "kv_ports": kv_ports,
            "http_port": port,
            "send_type": "PUT_ASYNC",
            "log": "debug",
            "kv": {
                "paths": ["cuda-ipc"],
                "lease_ms": 30000,
                "transfer_timeout_ms": 20000,
                "connect_timeout_ms": 2000,
                "ping_interval_ms": 250,
                "peer_timeout_ms": 1000,
                "digest": "sampled",
                "digest_sample_every": 16,
                "tcp_streams": 2,
                "inflight_max": 64,
                "part_bytes_min": 262144,
                "load_failure_policy": "fail",
            },
        });
        want
    };
    for (minor, policy) in [(24, true), (32, true), (33, true), (34, true)] {
        let plan = planned(&config, minor);
        let (prefill, decode) = (&plan.workers[0], &plan.workers[1]);
        assert_eq!(kv_settings(prefill), want("kv_producer", 0, json!([14579, 40001]), 8100, policy), "0.{minor}");
        assert_eq!(kv_settings(decode), want("kv_consumer", 1, json!([14580]), 8200, policy), "0.{minor}");
        for worker in &plan.workers {
            assert_eq!(worker.env["VLLM_WORKER_MULTIPROC_METHOD"], "spawn");
            assert_eq!(worker.env["PDLINK_SECRET_FILE"], "/run/x/secret");
            assert!(worker.has_runtime);
            let kv_ports = kv_settings(worker)["kv_connector_extra_config"]["kv_ports"].clone();
            assert_eq!(json!(worker.kv_ports), kv_ports, "one for each rank");
        }
        assert_eq!(plan.warnings.len(), usize::from(minor == 34), "0.{minor}: {:?}", plan.warnings);
    }
    config.kv.paths = Some(vec![Path::Nixl]);
    config.kv.nixl.environment = Some("/opt/nixl".into());
    let told = kv_settings(&planned_on_cpu(&config, 2).workers[0])["kv_connector_extra_config"]["kv"]["nixl"].clone();
    assert_eq!(told, json!({ "environment": "/opt/nixl", "backend": "UCX", "parameters": {}, "env": {} }));
}

#[test]
fn variables_of_nixl_go_to_the_workers_that_use_it() {
    let mut config = pd(&[0], &[1]);
    config.kv.nixl.env = [("UCX_TLS".to_owned(), "rc,tcp".to_owned())].into();
    let with_it = |config: &Config| {
        planned(config, 33).workers.iter().filter(|worker| worker.env.get("UCX_TLS") == Some(&"rc,tcp".into())).count()
    };
    assert_eq!(with_it(&config), 0, "cuda-ipc is the path");
    config.pd_disagg.connector_impl = ConnectorImpl::Vllm;
    config.pd_disagg.kv_connector = KvConnector::NixlConnector;
    assert_eq!(with_it(&config), 2, "vLLM's own NIXL");
    config.inference.engine = EngineKind::Reference;
    config.kv.paths = Some(vec![Path::Nixl]);
    assert_eq!(with_it(&config), 2, "the reference engine over nixl");
}

#[test]
fn vllms_own_connectors_get_what_their_version_knows() {
    let mut config = pd(&[0, 1], &[2, 3]);
    config.pd_disagg.prefill_tp = Some(2);
    config.pd_disagg.connector_impl = ConnectorImpl::Vllm;
    config.pd_disagg.kv_send_type = Some(KvSendType::Get);

    config.pd_disagg.kv_connector = KvConnector::NixlConnector;
    for minor in [24, 32, 33] {
        let plan = planned(&config, minor);
        let want =
            |role: &str| json!({ "kv_connector": "NixlConnector", "kv_role": role, "kv_load_failure_policy": "fail" });
        assert_eq!(kv_settings(&plan.workers[0]), want("kv_producer"), "0.{minor}");
        assert_eq!(kv_settings(&plan.workers[2]), want("kv_consumer"), "0.{minor}");
        let side: Vec<_> =
            plan.workers.iter().map(|worker| worker.env["VLLM_NIXL_SIDE_CHANNEL_PORT"].as_str()).collect();
        assert_eq!(side, ["14579", "14580", "14581"]);
        assert_eq!(plan.workers[0].env["VLLM_NIXL_SIDE_CHANNEL_HOST"], "127.0.0.1");
        assert!(!plan.workers[0].has_runtime && !plan.workers[0].env.contains_key("PDLINK_SECRET_FILE"));
    }

    config.pd_disagg.kv_connector = KvConnector::P2pNcclConnector;
    let plan = planned(&config, 23);
    assert_eq!(
        kv_settings(&plan.workers[0]),
        json!({
            "kv_connector": "P2pNcclConnector",
            "kv_role": "kv_producer",
            "kv_rank": 0,
            "kv_parallel_size": 3,
            "kv_port": 14579,
            "kv_connector_extra_config": { "http_port": "8100", "send_type": "GET" },
        })
    );
    // Two ranks listen at 14579 and 14580, so decode begins behind them.
    assert_eq!(kv_settings(&plan.workers[1])["kv_port"], json!(14581));
    assert_eq!(kv_settings(&plan.workers[2])["kv_rank"], json!(2));
    assert_eq!(plan.workers[0].env["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"], "1");
    assert_eq!(plan.workers[0].env["VLLM_HOST_IP"], "127.0.0.1");

    let error = made(&config, 24, &mut TablePorts::busy(&[])).expect_err("gone in 0.24");
    assert!(matches!(error, PlanError::P2pGone { .. }), "{error}");
    assert!(error.to_string().contains("connector_impl = \"native\""), "{error}");
}

#[test]
fn versions_outside_of_the_tested_range_are_named() {
    let mut own = pd(&[0], &[1]);
    own.pd_disagg.connector_impl = ConnectorImpl::Vllm;
    own.pd_disagg.kv_connector = KvConnector::NixlConnector;
    for (minor, warned) in [(20, true), (23, true), (24, false), (33, false), (34, true)] {
        let plan = planned(&own, minor);
        let named = plan.warnings.iter().any(|warning| warning.contains(&format!("vLLM 0.{minor} is outside")));
        assert_eq!(named, warned, "0.{minor}: {:?}", plan.warnings);
    }
    let refused = |config: &Config, minor| made(config, minor, &mut TablePorts::busy(&[])).expect_err("too old");
    assert!(matches!(refused(&own, 19), PlanError::TooOld { .. }));
    let error = refused(&pd(&[0], &[1]), 23);
    assert!(matches!(error, PlanError::TooOldForNative { .. }) && error.to_string().contains("0.24"), "{error}");
    own.pd_disagg.kv_send_type = Some(KvSendType::Put);
    assert!(matches!(refused(&own, 23), PlanError::NoNixlPush { .. }));
}

#[test]
fn who_drives_the_copy_chooses_vllms_nixl_class() {
    let mut config = pd(&[0], &[1]);
    config.pd_disagg.connector_impl = ConnectorImpl::Vllm;
    config.pd_disagg.kv_connector = KvConnector::NixlConnector;
    let cases = [
        (None, "NixlConnector"),
        (Some(KvSendType::Get), "NixlConnector"),
        (Some(KvSendType::Put), "NixlPushConnector"),
        (Some(KvSendType::PutAsync), "NixlPushConnector"),
    ];
    for (send_type, class) in cases {
        config.pd_disagg.kv_send_type = send_type;
        for worker in &planned(&config, 33).workers {
            assert_eq!(kv_settings(worker)["kv_connector"], class, "{send_type:?}");
        }
    }
    let native = pd(&[0], &[1]);
    assert_eq!(native.pd_disagg.send_type(), KvSendType::PutAsync, "PRIME-RL's default");
}

#[test]
fn workers_on_a_cpu_share_its_cores_and_its_memory() {
    let mut config = pd(&[0], &[1]);
    let plan = planned_on_cpu(&config, 2);
    for worker in &plan.workers {
        assert!(!worker.env.contains_key("CUDA_VISIBLE_DEVICES"));
        assert_eq!(worker.env["VLLM_CPU_OMP_THREADS_BIND"], "nobind");
        assert_eq!(
            (worker.env["OMP_NUM_THREADS"].as_str(), worker.env["VLLM_ENABLE_V1_MULTIPROCESSING"].as_str()),
            ("1", "0")
        );
        assert_eq!(flag(worker, "--gpu-memory-utilization"), Some("0.45"));
        let extra = &kv_settings(worker)["kv_connector_extra_config"];
        assert_eq!(extra["kv"]["paths"], json!(["shm", "tcp"]), "KV lies in host memory");
    }
    assert!(plan.notes.iter().any(|note| note.contains("0.32.0+cpu computes on the CPU")), "{:?}", plan.notes);

    let binds = |plan: &Plan| {
        plan.workers.iter().map(|worker| worker.env["VLLM_CPU_OMP_THREADS_BIND"].clone()).collect::<Vec<_>>()
    };
    let plan = planned_on_cpu(&config, 8);
    assert_eq!(binds(&plan), ["1-3", "5-7"]);
    assert!(plan.workers.iter().all(|worker| !worker.env.contains_key("VLLM_ENABLE_V1_MULTIPROCESSING")));
    config.pd_disagg.prefill_gpu_ids = vec![0, 2];
    config.pd_disagg.prefill_tp = Some(2);
    let plan = planned_on_cpu(&config, 12);
    assert_eq!(binds(&plan), ["1-3|4-6", "8-10"]);
    assert_eq!(flag(&plan.workers[0], "--gpu-memory-utilization"), Some("0.3"));

    // What is said wins: a size of the KV cache, cores by the role's environment, paths that reach host memory.
    pass(&mut config, "", "kv_cache_memory_bytes", json!("128M"));
    config.pd_disagg.decode_env.insert("VLLM_CPU_OMP_THREADS_BIND".to_owned(), "11".to_owned());
    config.kv.paths = Some(vec![Path::Tcp]);
    let plan = planned_on_cpu(&config, 12);
    assert_eq!(flag(&plan.workers[0], "--kv-cache-memory-bytes"), Some("128M"));
    assert_eq!((flag(&plan.workers[0], "--gpu-memory-utilization"), binds(&plan)[1].as_str()), (Some("0.9"), "11"));
    assert_eq!(kv_settings(&plan.workers[0])["kv_connector_extra_config"]["kv"]["paths"], json!(["tcp"]));

    config.kv.paths = Some(vec![Path::CudaIpc]);
    let error = made_with(&config, &vllm("0.32.0+cpu"), &[0, 1], &mut TablePorts::busy(&[])).expect_err("no such path");
    assert!(matches!(error, PlanError::NoPath { .. }) && error.is_configuration(), "{error}");
    assert!(error.to_string().contains("`kv.paths` asks for cuda-ipc, and vLLM 0.32.0+cpu"), "{error}");

    config.kv.paths = Some(vec![Path::CudaIpc, Path::Tcp]);
    let plan = planned_on_cpu(&config, 2);
    assert_eq!(plan.link.as_ref().map(|link| link.paths.as_slice()), Some(&[Path::Tcp][..]));
    assert!(plan.notes.iter().any(|note| note.contains("cuda-ipc cannot move KV in host memory")), "{:?}", plan.notes);

    config.pd_disagg.connector_impl = ConnectorImpl::Vllm;
    config.pd_disagg.kv_connector = KvConnector::NixlConnector;
    let plan = planned_on_cpu(&config, 2);
    assert_eq!(kv_settings(&plan.workers[0])["kv_buffer_device"], "cpu");
    assert!(plan.notes.iter().any(|note| note.contains("NIXL keeps a core busy")), "{:?}", plan.notes);
}

#[test]
fn what_a_host_lacks_is_named_with_the_mend() {
    let config = pd(&[0], &[7]);
    let plan = planned(&config, 33);
    let host = |gpus, model_fault| Host { gpus, cores: vec![0], model_fault };
    let whole = host(Gpus::Count(8), None);
    let with = |wheel| VllmProgram { wheel, python: Some("/env/bin/python".to_owned()), ..vllm("0.33.0") };
    let ours = env!("CARGO_PKG_VERSION").to_owned();
    let installed = with(Wheel::Installed { version: ours.clone() });
    assert_eq!(faults(&config, &plan, &whole, Some(&installed)), []);
    let cases = [
        (with(Wheel::Missing), whole.clone(), "-m pip install"),
        (
            with(Wheel::Installed { version: "9.9".to_owned() }),
            whole.clone(),
            "the connector in vLLM's environment is 9.9",
        ),
        (with(Wheel::Broken { version: ours, why: "ImportError: x".to_owned() }), whole.clone(), "ImportError: x"),
        (installed.clone(), host(Gpus::Count(2), None), "GPU 7 (decode worker, `pd_disagg.decode_gpu_ids`)"),
        (installed.clone(), host(Gpus::Count(0), None), "which has none"),
        (installed.clone(), host(Gpus::Count(8), Some(ModelFault::Missing)), "the model `M` is a path"),
        (installed.clone(), host(Gpus::Count(8), Some(ModelFault::NoModel)), "has no config.json"),
    ];
    for (vllm, host, want) in cases {
        let found = faults(&config, &plan, &host, Some(&vllm));
        assert!(found.len() == 1 && found[0].to_string().contains(want), "{want} in {found:?}");
    }
    // What cannot be told is no fault, and is said.
    let unknown = host(Gpus::Unknown, None);
    let stranger = vllm("0.33.0");
    assert_eq!(faults(&config, &plan, &unknown, Some(&stranger)), []);
    let said = doubts(&config, &plan, &unknown, Some(&stranger)).join("\n");
    assert!(said.contains("connector is installed") && said.contains("GPU 0, 7"), "{said}");
    // A wheel that is not used is not missed, and a CPU needs no GPU.
    let mut own = config.clone();
    own.pd_disagg.connector_impl = ConnectorImpl::Vllm;
    assert_eq!(faults(&own, &plan, &whole, Some(&with(Wheel::Missing))), []);
    let on_cpu = VllmProgram { wheel: Wheel::Missing, ..vllm("0.32.0+cpu") };
    let found = faults(&config, &plan, &host(Gpus::Count(0), None), Some(&on_cpu));
    assert!(matches!(found.as_slice(), [HostFault::NoWheel { .. }]), "{found:?}");
}

#[test]
fn every_inference_setting_reaches_vllm() {
    let mut config = pd(&[0], &[1]);
    let inference = &mut config.inference;
    inference.enable_lora = true;
    inference.max_lora_rank = Some(32);
    inference.enable_prefix_caching = Some(false);
    inference.gpu_memory_utilization = 0.5;
    inference.api_server_count = 2;
    inference.seed = 7;
    inference.enable_expert_parallel = true;
    inference.enable_eplb = true;
    inference.model.max_model_len = Some(2048);
    inference.model.enforce_eager = true;
    inference.model.trust_remote_code = true;
    inference.model.enable_auto_tool_choice = true;
    inference.model.reasoning_parser = Some("qwen3".to_owned());
    inference.model.rope_scaling = Some(json!("{\"rope_type\": \"yarn\", \"factor\": 4.0}"));
    config.pd_disagg.decode_all2all_backend = Some(All2AllBackend::DeepepLowLatency);
    let plan = planned(&config, 33);
    let (prefill, decode) = (&plan.workers[0], &plan.workers[1]);
    let before_kv = |worker: &WorkerPlan| {
        worker.command.iter().take_while(|word| *word != "--kv-transfer-config").cloned().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        before_kv(prefill),
        "/env/bin/vllm serve M --host 127.0.0.1 --port 8100 --dtype auto --max-model-len 2048 --enforce-eager \
         --trust-remote-code --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3 --hf-overrides \
         {\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":4.0}} --tensor-parallel-size 1 --gpu-memory-utilization 0.5 \
         --api-server-count 2 --seed 7 --enable-lora --max-loras 8 --max-cpu-loras 100 --max-lora-rank 32 \
         --no-enable-prefix-caching --enable-expert-parallel --all2all-backend allgather_reducescatter --enable-eplb \
         --disable-access-log-for-endpoints /health,/metrics \
         --worker-extension-cls pdlink.vllm.weights.WeightsExtension"
    );
    assert_eq!(flag(decode, "--all2all-backend"), Some("deepep_low_latency"));
    assert_eq!(prefill.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], "1");
    assert!(plan.warnings.iter().any(|warning| warning.contains("api_server_count = 1")), "{:?}", plan.warnings);
    assert!(prefill.command.iter().all(|word| !word.contains("data-parallel")), "one data-parallel rank per worker");
}

fn pass(config: &mut Config, table: &str, name: &str, value: Value) {
    let vllm = &mut config.inference.vllm;
    let args = match table {
        "prefill" => &mut vllm.prefill,
        "decode" => &mut vllm.decode,
        _ => &mut vllm.all,
    };
    args.insert(name.to_owned(), value);
}

#[test]
fn further_arguments_pass_through_per_role_and_win() {
    let mut config = pd(&[0], &[1]);
    pass(&mut config, "", "max_num_seqs", json!(64));
    pass(&mut config, "", "seed", json!(3));
    pass(&mut config, "", "disable-log-stats", json!(true));
    pass(&mut config, "decode", "max_num_seqs", json!(256));
    pass(&mut config, "decode", "compilation_config", json!({ "cudagraph_mode": "FULL_DECODE_ONLY" }));
    pass(&mut config, "decode", "async_scheduling", json!(false));
    pass(&mut config, "prefill", "logits_bias", json!("-1"));
    let plan = planned(&config, 33);
    let (prefill, decode) = (&plan.workers[0], &plan.workers[1]);
    assert_eq!((flag(prefill, "--max-num-seqs"), flag(decode, "--max-num-seqs")), (Some("64"), Some("256")));
    assert_eq!(prefill.command.iter().filter(|word| *word == "--seed").count(), 1);
    assert_eq!(flag(prefill, "--seed"), Some("3"));
    assert_eq!(flag(decode, "--compilation-config"), Some("{\"cudagraph_mode\":\"FULL_DECODE_ONLY\"}"));
    for (worker, word) in
        [(prefill, "--disable-log-stats"), (decode, "--no-async-scheduling"), (prefill, "--logits-bias=-1")]
    {
        assert!(worker.command.iter().any(|given| given == word), "{word} in {:?}", worker.command);
    }
}

#[test]
fn only_paths_that_exist_are_promised_and_python_prefers_the_same() {
    let mut config = pd(&[0], &[1]);
    let paths = |plan: &Plan| plan.link.as_ref().map(|link| link.paths.clone()).unwrap_or_default();
    assert_eq!(paths(&planned(&config, 33)), [Path::CudaIpc, Path::Nccl]);

    // Run without the launcher, the connector's own list is what counts.
    let connector = include_str!("../python/pdlink/vllm/connector.py");
    let class = connector.split("class P2pNcclConnector(").nth(1).expect("the class");
    let list = class.lines().find_map(|line| line.trim().strip_prefix("PATHS = ")).expect("its paths");
    assert_eq!(serde_json::from_str::<Value>(list).expect("a list"), json!(paths(&planned(&config, 33))));

    config.pd_disagg.kv_connector = KvConnector::NixlConnector;
    let plan = planned(&config, 33);
    assert_eq!(paths(&plan), [Path::Nixl]);
    assert_eq!(kv_settings(&plan.workers[0])["kv_connector_extra_config"]["kv"]["paths"], json!(["nixl"]));

    config.kv.paths = Some(vec![Path::Shm]);
    let error = made(&config, 33, &mut TablePorts::busy(&[])).expect_err("no such path for a GPU");
    let text = error.to_string();
    for part in ["`kv.paths` asks for shm", "GPU memory", "set it to some of cuda-ipc, nccl, nixl", "= \"vllm\"`"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn secrets_are_neither_in_commands_nor_in_what_is_shown() {
    let mut config = pd(&[0], &[1]);
    pass(&mut config, "", "api_key", json!("sk-hidden"));
    config.pd_disagg.prefill_env.insert("HF_TOKEN".to_owned(), "hf-hidden".to_owned());
    config.pd_disagg.prefill_env.insert("TOKENIZERS_PARALLELISM".to_owned(), "false".to_owned());
    let plan = planned(&config, 33);
    assert_eq!(plan.workers[0].env["VLLM_API_KEY"], "sk-hidden", "it reaches the worker");
    assert_eq!(plan.workers[0].env["HF_TOKEN"], "hf-hidden");
    let shown = plan.to_json().to_string();
    assert!(!shown.contains("hidden"), "{shown}");
    assert!(!plan.workers.iter().any(|worker| worker.command.iter().any(|word| word.contains("hidden"))));
    assert_eq!(plan.workers[0].shown_env()["TOKENIZERS_PARALLELISM"], "false");
}

#[test]
fn the_plan_for_machines_names_every_worker_and_the_proxy() {
    let mut config = pd(&[0, 1], &[2]);
    config.inference.parallel.tp = 1;
    config.pd_disagg.prefill_tp = Some(2);
    config.weight_broadcast = Some(serde_json::from_value(json!({ "type": "nccl" })).expect("a section"));
    let shown = planned(&config, 33).to_json();
    assert_eq!(shown["proxy"]["base_url"], "http://127.0.0.1:8000/v1");
    assert_eq!(shown["world_size"], 4, "three ranks and the trainer");
    assert_eq!(shown["kv_connector"], "P2pNcclConnector");
    let worker = &shown["workers"][0];
    assert_eq!((&worker["role"], &worker["gpus"], &worker["port"]), (&json!("prefill"), &json!([0, 1]), &json!(8100)));
    assert_eq!(worker["kv_port"], 14579);
    assert_eq!(worker["env"]["CUDA_VISIBLE_DEVICES"], "0,1");
    assert_eq!(worker["command"][1], "serve");

    config.weight_broadcast = None;
    assert!(planned(&config, 33).to_json().get("world_size").is_none());
}

#[test]
fn reference_workers_are_told_what_differs_from_the_default() {
    let mut config = pd(&[0], &[1]);
    config.inference.engine = EngineKind::Reference;
    config.inference.reference.num_blocks = 128;
    config.inference.enable_prefix_caching = Some(false);
    config.kv.paths = Some(vec![Path::Tcp]);
    let place = &Place::default();
    let around = Surroundings { pdlink: "/bin/pdlink", vllm: None, cores: &[], secret_file: "/run/x/secret", place };
    let plan = plan(&config, &around, &mut TablePorts::busy(&[])).expect("no vllm is needed");
    assert_eq!(
        plan.workers[0].command.join(" "),
        "/bin/pdlink engine --role prefill --host 127.0.0.1 --port 8100 --kv-port 14579 --model M --tp 1 \
         --inference.reference.num_blocks 128 --kv.paths [\"tcp\"] --inference.enable_prefix_caching false \
         --pd_disagg.kv_send_type PUT_ASYNC"
    );
    assert_eq!(plan.workers[1].role, Role::Decode);
    assert_eq!(plan.link.expect("a link").paths, [Path::Tcp]);
}

#[test]
fn without_pd_plain_workers_stand_behind_the_servers_port() {
    let mut config = Config::default();
    config.inference.server.port = 9000;
    config.inference.parallel.dp = 2;
    config.inference.parallel.tp = 2;
    config.inference.kv_transfer_config = Some(json!("{\"kv_connector\": \"X\", \"kv_role\": \"kv_both\"}"));
    let plan = planned(&config, 33);
    assert_eq!(plan.proxy.base_url(), "http://127.0.0.1:9000/v1");
    let workers: Vec<_> = plan.workers.iter().map(|worker| (worker.name(), worker.gpus.clone(), worker.port)).collect();
    assert_eq!(workers, [("worker_0".to_owned(), vec![0, 1], 8200), ("worker_1".to_owned(), vec![2, 3], 8201)]);
    assert_eq!(plan.workers[0].kv_port, None);
    assert_eq!(kv_settings(&plan.workers[0])["kv_connector"], "X");
    assert!(plan.link.is_none());
}
