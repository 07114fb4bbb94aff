//! GPUs against the configured ids, and whether those of each pair reach each other.

use std::collections::BTreeSet;

use super::super::check::Answer;
use super::super::setting::Setting;
use super::memory::gib;
use crate::config::{Config, Path, Role};
use crate::ffi::cuda::{Pair, Survey};

pub(super) fn check(setting: &Setting) -> Answer {
    let needed = setting.needs_gpus();
    let survey = match &setting.survey {
        Ok(survey) => survey,
        Err(error) => {
            let mend = "install NVIDIA's driver, and give the container its GPUs (`--gpus all` of docker)";
            return Answer::absent(needed, format!("no GPU can be used: {error}"), mend);
        }
    };
    let count = survey.gpus.len();
    let roles = setting.config().filter(|_| needed).map_or(&[][..], Config::roles);
    let ids: BTreeSet<u32> = roles.iter().flat_map(|role| setting.gpu_ids(*role)).collect();
    let missing: Vec<String> =
        ids.iter().filter(|id| usize::try_from(**id).map_or(true, |id| id >= count)).map(u32::to_string).collect();
    let seen = in_words(survey);
    let answer = if missing.is_empty() {
        Answer::ok(seen)
    } else {
        let mend = "list ids that `nvidia-smi -L` shows in pd_disagg.prefill_gpu_ids and decode_gpu_ids";
        Answer::fail(format!("{seen}; GPU {} is configured and not there", missing.join(", ")), mend)
    };
    let names: Vec<String> = survey.gpus.iter().map(|gpu| gpu.name.clone()).collect();
    answer.with("cuda", survey.cuda.clone()).with("gpus", names)
}

fn in_words(survey: &Survey) -> String {
    let gpus: Vec<String> =
        survey.gpus.iter().enumerate().map(|(id, gpu)| format!("{id}: {} ({})", gpu.name, gib(gpu.bytes))).collect();
    format!("driver for CUDA {}; GPU {}", survey.cuda, gpus.join(", "))
}

pub(super) fn peers(setting: &Setting) -> Answer {
    let Ok(survey) = &setting.survey else { return Answer::skipped("no GPU can be used; see gpus") };
    let wanted = wanted(setting);
    let met: Vec<Pair> = survey.pairs.iter().copied().filter(|pair| wanted(pair)).collect();
    if met.is_empty() {
        return Answer::skipped("no two GPUs are to meet");
    }
    judge(&met, setting.allows(Path::CudaIpc))
}

/// Prefill's GPUs and decode's, both ways; without a configuration all.
fn wanted(setting: &Setting) -> impl Fn(&Pair) -> bool + use<> {
    let has_pairs = setting.config().is_some_and(|config| config.pd_disagg.enabled);
    let (prefill, decode) = (setting.ordinals(Role::Prefill), setting.ordinals(Role::Decode));
    move |pair| {
        !has_pairs
            || (prefill.contains(&pair.from) && decode.contains(&pair.to))
            || (decode.contains(&pair.from) && prefill.contains(&pair.to))
    }
}

fn judge(pairs: &[Pair], cuda_ipc: bool) -> Answer {
    let names =
        |pairs: &[&Pair]| pairs.iter().map(|pair| format!("{}→{}", pair.from, pair.to)).collect::<Vec<_>>().join(", ");
    let apart: Vec<&Pair> = pairs.iter().filter(|pair| !pair.access).collect();
    let slow: Vec<&Pair> = pairs.iter().filter(|pair| pair.access && !pair.atomics).collect();
    if !apart.is_empty() {
        let mend = "pair GPUs that reach each other (`nvidia-smi topo -p2p r`), or turn off what keeps them apart (IOMMU, ACS)";
        return Answer::fault(cuda_ipc, format!("GPUs without peer access: {}", names(&apart)), mend);
    }
    if !slow.is_empty() {
        let mend = "pair GPUs that share an NVLink (`nvidia-smi topo -m`) where there are some";
        return Answer::warn(format!("reached without atomics, so over PCIe and not NVLink: {}", names(&slow)), mend);
    }
    Answer::ok(format!("{} pairs reach each other, with atomics, as over NVLink", pairs.len()))
}

#[cfg(test)]
mod tests {
    use super::super::super::check::Verdict;
    use super::*;

    #[test]
    fn pairs_that_cannot_meet_are_a_failure_where_they_must() {
        let pair = |access, atomics| Pair { from: 0, to: 1, access, atomics };
        let judged = |access, atomics, needed| judge(&[pair(true, true), pair(access, atomics)], needed).result;
        assert_eq!(judged(true, true, true), Verdict::Ok);
        assert_eq!(judged(true, false, true), Verdict::Warn);
        assert_eq!((judged(false, false, true), judged(false, false, false)), (Verdict::Fail, Verdict::Warn));
    }
}
