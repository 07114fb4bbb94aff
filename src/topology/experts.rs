//! What is wrong with settings about experts for the vLLM that is there: said before the run, since vLLM says it only once it
//! has loaded half of itself, or not at all.

use super::vllm::VllmVersion;
use crate::config::{All2AllBackend, Config, Role};

/// Known to have these names; 0.24 has not.
const LATE_NAMES: VllmVersion = VllmVersion::new(0, 33);
/// From here on MORI's two modes have names of their own, and the one for both is gone.
const MORI_PARTED: VllmVersion = VllmVersion::new(0, 24);

/// Everything to be said of a role's experts.
pub(super) fn doubts(config: &Config, version: VllmVersion, role: Role) -> Vec<String> {
    let inference = &config.inference;
    if !inference.enable_expert_parallel {
        return Vec::new();
    }
    let mut doubts = Vec::new();
    let backend = config.all2all_backend(role);
    let role_name = role.name();
    let name = backend.name();
    match backend {
        All2AllBackend::Moonep | All2AllBackend::Passthrough if version < LATE_NAMES => doubts.push(format!(
            "vLLM {version} may not know all2all_backend = \"{name}\" ({role_name}), which {LATE_NAMES} has: it then refuses to start"
        )),
        All2AllBackend::Mori if version >= MORI_PARTED => doubts.push(format!(
            "vLLM {version} has no all2all_backend \"mori\" ({role_name}) and refuses to start; write \"mori_high_throughput\" or \
             \"mori_low_latency\""
        )),
        _ => {}
    }
    if config.tp(role) == 1 {
        let what = if inference.enable_eplb {
            "enable_eplb needs more than one GPU for each worker, and vLLM refuses to start"
        } else {
            "one GPU has all experts, so enable_expert_parallel changes nothing"
        };
        doubts.push(format!("{role_name} workers have one GPU each: {what}; raise the role's tensor parallel size"));
    }
    doubts
}

#[cfg(test)]
mod tests {
    use super::super::ports::{PortError, PortWish, Ports};
    use super::super::vllm::VllmProgram;
    use super::super::{Place, Surroundings, plan};
    use super::*;

    fn with(backend: All2AllBackend, tp: u32, eplb: bool) -> Config {
        let mut config = Config::default();
        config.inference.enable_expert_parallel = true;
        config.inference.enable_eplb = eplb;
        config.inference.all2all_backend = backend;
        config.pd_disagg.prefill_tp = Some(tp);
        config
    }

    #[test]
    fn names_that_a_version_does_not_have_are_said() {
        use All2AllBackend::{AllgatherReducescatter, DeepepV2, Moonep, Mori, MoriLowLatency, NixlEp, Passthrough};
        let said = |backend, minor| {
            let doubts = doubts(&with(backend, 2, true), VllmVersion::new(0, minor), Role::Prefill);
            doubts.first().cloned().unwrap_or_default()
        };
        for minor in 24..=33 {
            for backend in [AllgatherReducescatter, DeepepV2, MoriLowLatency, NixlEp] {
                assert_eq!(said(backend, minor), "", "{backend:?} with 0.{minor}");
            }
            assert!(said(Mori, minor).contains("mori_high_throughput"));
            assert_eq!(said(Moonep, minor).is_empty(), minor == 33);
            assert_eq!(said(Passthrough, minor).is_empty(), minor == 33);
        }
    }

    #[test]
    fn one_gpu_has_no_experts_to_spread() {
        let said =
            |eplb| doubts(&with(All2AllBackend::default(), 1, eplb), VllmVersion::new(0, 33), Role::Prefill).join("");
        assert!(said(false).contains("changes nothing") && said(true).contains("refuses to start"));
        let off = Config::default();
        assert!(doubts(&off, VllmVersion::new(0, 33), Role::Decode).is_empty());
    }

    struct AnyPort;

    impl Ports for AnyPort {
        fn take(&mut self, wish: PortWish<'_>) -> Result<u16, PortError> {
            Ok(wish.base)
        }
    }

    #[test]
    fn each_roles_settings_reach_vllm_in_every_version() {
        let text = include_str!("../../configs/expert_parallel.toml");
        let mut config: Config = toml::from_str(text).expect("a configuration");
        let place = Place::default();
        for minor in 24..=33 {
            let vllm = VllmProgram::new(vec!["vllm".to_owned()], &format!("0.{minor}.0")).expect("a version");
            let around =
                Surroundings { pdlink: "pdlink", vllm: Some(&vllm), cores: &[], secret_file: "secret", place: &place };
            let plan = plan(&config, &around, &mut AnyPort).expect("a plan");
            assert_eq!(plan.warnings, [""; 0], "0.{minor}");
            for (worker, backend) in plan.workers.iter().zip(["deepep_high_throughput", "deepep_low_latency"]) {
                let has = |words: &[&str]| worker.command.windows(words.len()).any(|own| own == words);
                assert!(has(&["--all2all-backend", backend]), "0.{minor}: {:?}", worker.command);
                assert!(
                    has(&["--enable-expert-parallel"]) && has(&["--enable-eplb"]),
                    "0.{minor}: {:?}",
                    worker.command
                );
                let eplb = worker.command.iter().position(|word| word == "--eplb-config").expect("given");
                assert!(worker.command[eplb + 1].contains("\"num_redundant_experts\":8"), "{:?}", worker.command);
            }
        }
        config.pd_disagg.decode_all2all_backend = Some(All2AllBackend::Moonep);
        let vllm = VllmProgram::new(vec!["vllm".to_owned()], "0.32.0").expect("a version");
        let around =
            Surroundings { pdlink: "pdlink", vllm: Some(&vllm), cores: &[], secret_file: "secret", place: &place };
        let plan = plan(&config, &around, &mut AnyPort).expect("a plan");
        assert!(plan.warnings.iter().any(|warning| warning.contains("moonep")), "{:?}", plan.warnings);
    }
}
