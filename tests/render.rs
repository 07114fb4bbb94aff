//! `pdlink render`: what a scheduler is given is complete, and has no secret in it.

use std::process::{Command, Output};

use serde_json::Value;

const PD: &str = r#"
[inference]
engine = "vllm"
[inference.model]
name = "org/model"
[inference.parallel]
tp = 2
[pd_disagg]
enabled = true
prefill_gpu_ids = [0, 1]
decode_gpu_ids = [2, 3]
[slurm]
partition = "gpu"
account = "team"
time = "2-00:00:00"
container_image = "registry#org/pdlink:1"
container_mounts = ["/models:/models:ro"]
env = { HF_HOME = "/models/it's here" }
setup = ["module load cuda"]
options = ["--constraint=h200"]
[kubernetes]
image = "registry/pdlink:1"
namespace = "serving"
devices = { "rdma/hca" = 1 }
memory = "200Gi"
model_claim = "weights"
env_from = ["hub-token"]
"#;

fn render(kind: &str, text: &str, overrides: &[&str]) -> Output {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("run.toml");
    std::fs::write(&file, text).expect("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
    command.args(["render", kind, "@", file.to_str().expect("UTF-8")]).args(overrides);
    command.env_remove("PDLINK_ADMIN_TOKEN").env_remove("PDLINK_SECRET_FILE").output().expect("runs")
}

fn rendered(kind: &str, text: &str, overrides: &[&str]) -> String {
    let output = render(kind, text, overrides);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn refused(kind: &str, text: &str, overrides: &[&str]) -> String {
    let output = render(kind, text, overrides);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    String::from_utf8(output.stderr).expect("UTF-8")
}

/// The configuration inside what was rendered, read as any other.
fn configuration_in(text: &str) -> Value {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("inner.toml");
    std::fs::write(&file, text).expect("written");
    let shown = Command::new(env!("CARGO_BIN_EXE_pdlink"))
        .args(["config", "check", "@", file.to_str().expect("UTF-8")])
        .output()
        .expect("runs");
    assert!(shown.status.success(), "{}\n{text}", String::from_utf8_lossy(&shown.stderr));
    toml::from_str(text).expect("TOML")
}

#[test]
fn the_batch_script_has_all_that_was_asked_for_and_the_shell_takes_it() {
    let script = rendered("slurm", PD, &["--proxy.admin_token", "hidden-token"]);
    for line in [
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=team",
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --gres=gpu:4",
        "#SBATCH --exclusive",
        "#SBATCH --constraint=h200",
        r"export HF_HOME='/models/it'\''s here'",
        "module load cuda",
    ] {
        assert!(script.lines().any(|own| own == line), "{line} is not in\n{script}");
    }
    assert!(
        script.contains(r#"--container-image=registry#org/pdlink:1 --container-mounts="$run:$run,/models:/models:ro""#)
    );
    assert!(script.contains("--container-env=HF_HOME") && !script.contains("hidden-token"), "{script}");
    let inner =
        script.split("<<'PDLINK_CONFIGURATION'\n").nth(1).and_then(|rest| rest.split("PDLINK_CONFIGURATION\n").next());
    let inner = configuration_in(inner.expect("a configuration"));
    assert_eq!(inner["pd_disagg"]["decode_gpu_ids"], serde_json::json!([2, 3]));
    assert_eq!(inner["inference"]["model"]["name"], "org/model");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("job.sh");
    std::fs::write(&file, &script).expect("written");
    let checked = Command::new("bash").arg("-n").arg(&file).output().expect("bash runs");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn the_reference_engine_asks_for_no_gpu() {
    let text = "[inference]\nengine = \"reference\"\n[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n";
    assert!(!rendered("slurm", text, &[]).contains("--gres"));
    assert!(!rendered("k8s", text, &["--kubernetes.image", "i"]).contains("nvidia.com/gpu: \"2\""));
}

const NODES: &str = r#"
[inference.model]
name = "org/model"
[pd_disagg]
enabled = true
[[hosts.nodes]]
address = "any-0"
prefill_gpu_ids = [0, 1]
[[hosts.nodes]]
address = "any-1"
decode_gpu_ids = [0, 1, 2, 3]
[[hosts.nodes]]
address = "any-2"
decode_gpu_ids = [0, 1, 2, 3]
[kubernetes]
image = "registry/pdlink:1"
"#;

#[test]
fn one_node_that_is_named_takes_the_place_that_the_job_gives_it() {
    let text = "[inference.model]\nname = \"org/model\"\n[pd_disagg]\nenabled = true\n[kubernetes]\nimage = \"i\"\n\
                [[hosts.nodes]]\naddress = \"any\"\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n";
    assert!(rendered("slurm", text, &[]).contains("--hosts.addresses \"$1\""));
    let yaml = rendered("k8s", text, &[]);
    assert!(yaml.contains("--node $((0 + POD_INDEX))") && yaml.contains("pdlink-0-0.pdlink-nodes"), "{yaml}");
}

#[test]
fn on_several_nodes_each_is_told_its_number_and_everybodys_names() {
    let script = rendered("slurm", NODES, &[]);
    assert!(script.contains("#SBATCH --nodes=3\n") && script.contains("#SBATCH --gres=gpu:4\n"), "{script}");
    assert!(script.contains("scontrol show hostnames \"$SLURM_JOB_NODELIST\""), "{script}");
    assert!(script.contains(r#"--node "$SLURM_NODEID" --hosts.addresses "$1"' "$run" "$addresses""#), "{script}");
    let yaml = rendered("k8s", NODES, &[]);
    // 600 s to join, 1800 s to load, and to meet; one look in 10 s.
    assert!(yaml.contains("failureThreshold: 246\n"), "{yaml}");
    let sets: Vec<&str> = yaml.split("---\n").filter(|document| document.contains("kind: \"StatefulSet\"")).collect();
    assert_eq!(sets.len(), 2, "node 0, and the two that are alike");
    assert!(sets[0].contains("replicas: 1\n") && sets[0].contains("--node $((0 + POD_INDEX))"), "{}", sets[0]);
    assert!(sets[1].contains("replicas: 2\n") && sets[1].contains("--node $((1 + POD_INDEX))"), "{}", sets[1]);
    assert!(sets[0].contains("readinessProbe:") && !sets[1].contains("Probe:"), "node 0 watches the others");
    assert!(sets[0].contains("nvidia.com/gpu: \"2\"") && sets[1].contains("nvidia.com/gpu: \"4\""));
    for address in ["pdlink-0-0.pdlink-nodes", "pdlink-1-0.pdlink-nodes", "pdlink-1-1.pdlink-nodes"] {
        assert!(yaml.contains(&format!("\"{address}\"")), "{address} is not in\n{yaml}");
    }
}

#[test]
fn manifests_have_the_run_its_front_and_what_pods_need() {
    let yaml = rendered("k8s", PD, &["--proxy.admin_token", "hidden-token"]);
    let documents: Vec<&str> = yaml.split("---\n").skip(1).collect();
    let kinds: Vec<&str> = documents
        .iter()
        .map(|document| {
            document.lines().find_map(|line| line.strip_prefix("kind: ")).expect("a kind").trim_matches('"')
        })
        .collect();
    assert_eq!(kinds, ["ConfigMap", "Secret", "Service", "Service", "StatefulSet", "PodMonitor"]);
    assert!(documents.iter().all(|document| document.contains("namespace: \"serving\"")));
    // The token is in the Secret, and nowhere else.
    assert_eq!(yaml.matches("hidden-token").count(), 1);
    assert!(documents[1].contains("admin-token: \"hidden-token\""));
    let pod = documents[4];
    for part in [
        "image: \"registry/pdlink:1\"",
        "nvidia.com/gpu: \"4\"",
        "rdma/hca: \"1\"",
        "- \"IPC_LOCK\"",
        "memory: \"200Gi\"",
        "claimName: \"weights\"",
        "path: \"/health\"",
        "startupProbe:",
        "livenessProbe:",
        "name: \"hub-token\"",
        "defaultMode: 256",
    ] {
        assert!(pod.contains(part), "{part} is not in\n{pod}");
    }
    let inner = documents[0].split("pdlink.toml: |\n").nth(1).expect("a configuration");
    let inner: Vec<&str> = inner.lines().take_while(|line| line.is_empty() || line.starts_with("    ")).collect();
    let inner = configuration_in(&inner.iter().map(|line| format!("{}\n", line.trim_start())).collect::<String>());
    assert_eq!(inner["security"]["secret_file"], "/run/secrets/pdlink/secret");
    assert_eq!(inner["pd_disagg"]["host"], "0.0.0.0");
    // Each time a secret of its own, unless one is named.
    assert_ne!(yaml, rendered("k8s", PD, &["--proxy.admin_token", "hidden-token"]));
    let named = rendered("k8s", PD, &["--kubernetes.secret", "mine"]);
    assert!(!named.contains("kind: \"Secret\"") && named.contains("secretName: \"mine\""));
}

#[test]
fn what_cannot_be_rendered_is_refused_with_the_mend() {
    let told = refused("k8s", "", &[]);
    assert!(told.contains("kubernetes.image"), "{told}");
    let secret = ["--slurm.env", r#"{ HF_TOKEN = "x" }"#];
    let told = refused("slurm", "", &secret);
    assert!(told.contains("HF_TOKEN") && told.contains("sbatch"), "{told}");
    let told = refused("slurm", "", &["--slurm.partition", "a'b"]);
    assert!(told.contains("slurm.partition"), "{told}");
    // Pools of a fixed size: the reason is told where the setting is read.
    let told = refused("k8s", PD, &["--orchestrator.client.elastic", r#"{ hostname = "x" }"#]);
    assert!(told.contains("elastic"), "{told}");
}
