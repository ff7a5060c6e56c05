//! A report for people.

use std::io::{self, Write};

use super::report::{Device, Report};

pub(super) fn print(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    let Some(version) = report.version else {
        return fault(report, out);
    };
    writeln!(out, "QEMU migration stream, version {version}")?;
    if let Some(qemu) = &report.qemu {
        writeln!(out, "sent by      {qemu}, by its rules")?;
    }
    if report.multifd {
        writeln!(
            out,
            "multifd      pages went over other connections and are not here"
        )?;
    }
    if let Some(machine) = &report.machine {
        writeln!(out, "machine      {machine}")?;
    }
    for subsection in &report.subsections {
        writeln!(out, "             {subsection}")?;
    }
    if let Some(id) = report.ram_section {
        writeln!(out, "ram          section {id}")?;
    }
    for block in &report.blocks {
        writeln!(out, "  {:>12} bytes  {}", block.bytes, block.name)?;
    }
    let initial = &report.initial;
    writeln!(
        out,
        "migration    {} ram sections, {} pages with bytes, {} zero pages",
        initial.ram_sections, initial.data_pages, initial.zero_pages
    )?;
    if let Some(end) = initial.end {
        writeln!(
            out,
            "devices      {} sections, {} bytes; description {} bytes; whole at byte {end}",
            initial.devices.len(),
            initial.device_bytes,
            initial.description_bytes
        )?;
        for device in &initial.devices {
            writeln!(out, "  {}", line(device))?;
        }
        writeln!(out, "checkpoints  {}", report.checkpoints.len())?;
    }
    if !report.checkpoints.is_empty() {
        writeln!(
            out,
            "  epoch      offset       bytes     pages      zero      blob  sections"
        )?;
    }
    for (at, c) in report.checkpoints.iter().enumerate() {
        writeln!(
            out,
            "  {:>5}  {:>10}  {:>10}  {:>8}  {:>8}  {:>8}  {:>8}",
            c.epoch,
            c.offset,
            c.end - c.offset,
            c.data_pages,
            c.zero_pages,
            c.blob_bytes,
            c.devices.len()
        )?;
        let before = match at.checked_sub(1).and_then(|at| report.checkpoints.get(at)) {
            Some(before) => &before.devices,
            None => &initial.devices,
        };
        changed(before, &c.devices, out)?;
    }
    fault(report, out)
}

/// Sections that came, went or changed their length.
fn changed(before: &[Device], now: &[Device], out: &mut dyn Write) -> io::Result<()> {
    for device in now {
        match before.iter().find(|b| b.id == device.id) {
            None => writeln!(out, "         came: {}", line(device))?,
            Some(b) if b.bytes != device.bytes => {
                writeln!(out, "         was {} bytes: {}", b.bytes, line(device))?;
            }
            Some(_) => {}
        }
    }
    for device in before {
        if !now.iter().any(|n| n.id == device.id) {
            writeln!(out, "         left out: {}", line(device))?;
        }
    }
    Ok(())
}

fn line(device: &Device) -> String {
    format!(
        "{:>12} bytes  {}/{} version {}, id {}",
        device.bytes, device.name, device.instance, device.version, device.id
    )
}

fn fault(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    match &report.fault {
        None => writeln!(
            out,
            "end          byte {}, between checkpoints",
            report.bytes
        ),
        Some(fault) => writeln!(out, "fault        {}", fault.text),
    }
}
