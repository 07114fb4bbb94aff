//! NVLinks that are down, and PCIe slots that give a GPU fewer lanes than it has.

use super::super::check::Answer;
use super::super::setting::Setting;
use crate::ffi::nvml::{Wires, wires};

pub(super) fn check(_: &Setting) -> Answer {
    match wires() {
        Ok(gpus) if gpus.is_empty() => Answer::skipped("there is no GPU"),
        Ok(gpus) => judge(&gpus),
        Err(error) => Answer::skipped(error),
    }
}

fn judge(gpus: &[Wires]) -> Answer {
    let seen: Vec<String> = gpus.iter().enumerate().map(|(id, gpu)| format!("{id}: {}", in_words(gpu))).collect();
    let seen = format!("GPU {}", seen.join("; "));
    let (some_down, narrow) = (gpus.iter().any(some_links_down), gpus.iter().any(narrow));
    let mut mends = Vec::new();
    if some_down {
        mends.push("transfers between GPUs get only the links that are up: look at `nvidia-smi nvlink --status`, and reset or replace the GPU");
    }
    if narrow {
        mends.push("move the card to a slot with all its lanes, or reseat it: memory of the host is reached that much more slowly");
    }
    let answer = if mends.is_empty() { Answer::ok(seen) } else { Answer::warn(seen, mends.join("; ")) };
    answer.with("gpus", serde_json::to_value(gpus).unwrap_or_default())
}

/// GPUs without any link up are made or sold that way.
fn some_links_down(gpu: &Wires) -> bool {
    gpu.nvlinks.contains(&true) && gpu.nvlinks.contains(&false)
}

fn narrow(gpu: &Wires) -> bool {
    gpu.pcie_width.is_some_and(|(now, most)| now < most)
}

fn in_words(gpu: &Wires) -> String {
    let (up, all) = (gpu.nvlinks.iter().filter(|up| **up).count(), gpu.nvlinks.len());
    let nvlinks = match up {
        0 => "no NVLink".to_owned(),
        _ if up == all => format!("{up} NVLinks"),
        _ => format!("{up} of {all} NVLinks"),
    };
    let pcie = match (gpu.pcie_width, gpu.pcie_generation) {
        (Some((now, most)), generation) => {
            let generation = generation.map(|number| format!(" {number}.0")).unwrap_or_default();
            let of = if now < most { format!(" of x{most}") } else { String::new() };
            format!("PCIe{generation} x{now}{of}")
        }
        _ => "PCIe unknown".to_owned(),
    };
    format!("{nvlinks}, {pcie}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Verdict;

    fn gpu(up: usize, down: usize, width: (u32, u32)) -> Wires {
        let nvlinks = [vec![true; up], vec![false; down]].concat();
        Wires { pcie_width: Some(width), pcie_generation: Some(5), nvlinks, ..Wires::default() }
    }

    #[test]
    fn what_is_down_or_narrow_is_told_with_what_to_do() {
        let whole = judge(&[gpu(18, 0, (16, 16)), gpu(0, 0, (16, 16)), gpu(0, 4, (16, 16))]);
        assert_eq!(whole.result, Verdict::Ok);
        assert_eq!(
            whole.seen,
            "GPU 0: 18 NVLinks, PCIe 5.0 x16; 1: no NVLink, PCIe 5.0 x16; 2: no NVLink, PCIe 5.0 x16"
        );
        let down = judge(&[gpu(16, 2, (16, 16))]);
        assert_eq!((down.result, down.seen.as_str()), (Verdict::Warn, "GPU 0: 16 of 18 NVLinks, PCIe 5.0 x16"));
        assert!(down.mend.unwrap().contains("nvlink --status"));
        let slow = judge(&[gpu(18, 0, (8, 16))]);
        assert_eq!((slow.result, slow.seen.as_str()), (Verdict::Warn, "GPU 0: 18 NVLinks, PCIe 5.0 x8 of x16"));
        assert!(slow.mend.unwrap().contains("slot"));
    }
}
