//! The PCI Express link of a device, as Linux tells it.

use std::path::Path;

/// How a device is linked to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The generation of PCI Express that it runs at now: a device at rest may slow its link down.
    pub generation: u32,
    /// Lanes in use.
    pub width: u32,
    /// The best that device and host can, where that is known.
    pub most: Option<(u32, u32)>,
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PCIe {} x{}", self.generation, self.width)?;
        match self.most {
            Some(most) if most != (self.generation, self.width) => {
                write!(f, " ({} x{} at most)", most.0, most.1)
            }
            _ => Ok(()),
        }
    }
}

/// The link of the device `bus` (as `0000:1b:00.0`) of the system whose file tree starts at `root`;
/// nothing where it is not told, as in many virtual machines.
pub(super) fn link(root: &Path, bus: &str) -> Option<Link> {
    let folder = root.join("sys/bus/pci/devices").join(bus);
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let pair = |speed: &str, width: &str| {
        let generation = generation(&read(speed)?)?;
        let width: u32 = read(width)?.trim().parse().ok()?;
        (1..=32).contains(&width).then_some((generation, width))
    };
    let (generation, width) = pair("current_link_speed", "current_link_width")?;
    let most = pair("max_link_speed", "max_link_width");
    Some(Link {
        generation,
        width,
        most,
    })
}

/// The generation whose lanes move so much, as in "32.0 GT/s PCIe".
fn generation(speed: &str) -> Option<u32> {
    let speeds = ["2.5", "5", "8", "16", "32", "64"];
    let number = speed.split_whitespace().next()?.trim_end_matches(".0");
    let at = speeds.iter().position(|s| *s == number)?;
    Some(at as u32 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUS: &str = "0000:1b:00.0";

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("sys/bus/pci/devices").join(BUS);
        std::fs::create_dir_all(&folder).unwrap();
        for (name, text) in files {
            std::fs::write(folder.join(name), text).unwrap();
        }
        root
    }

    #[test]
    fn generation_and_width_are_read_and_a_slower_link_names_the_best() {
        let now = [
            ("current_link_speed", "32.0 GT/s PCIe\n"),
            ("current_link_width", "16\n"),
        ];
        let found = link(tree(&now).path(), BUS).unwrap();
        assert_eq!(found.to_string(), "PCIe 5 x16");
        let all = [
            ("current_link_speed", "2.5 GT/s PCIe\n"),
            ("current_link_width", "8\n"),
            ("max_link_speed", "16.0 GT/s PCIe\n"),
            ("max_link_width", "16\n"),
        ];
        let found = link(tree(&all).path(), BUS).unwrap();
        assert_eq!(found.to_string(), "PCIe 1 x8 (4 x16 at most)");
    }

    #[test]
    fn what_is_not_told_is_left_out() {
        assert_eq!(link(tree(&[]).path(), BUS), None);
        let unknown = [
            ("current_link_speed", "Unknown\n"),
            ("current_link_width", "63\n"),
        ];
        assert_eq!(link(tree(&unknown).path(), BUS), None);
    }
}
