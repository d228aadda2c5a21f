/*
 * QuPath: score the detections of the open image with the exported model inside QuPath, by the Deep
 * Java Library. Needs QuPath's DJL extension with the engine OnnxRuntime, and no Python.
 *
 * Patches are read as classify.py reads them where the µm/px of slide and model agree within 10%.
 * Elsewhere QuPath's resampling is another than training's: then use score_detections.groovy.
 */
import ai.djl.ndarray.NDList
import ai.djl.ndarray.types.DataType
import ai.djl.ndarray.types.Shape
import ai.djl.repository.zoo.Criteria
import ai.djl.translate.NoopTranslator
import groovy.json.JsonSlurper
import java.nio.ByteBuffer
import java.nio.file.Paths
import qupath.lib.regions.RegionRequest

def file = '/path/to/model.onnx'   // an older OnnxRuntime needs export.py --opset 18
int batch = 64

def model = Criteria.builder().setTypes(NDList, NDList).optModelPath(Paths.get(file))
        .optEngine('OnnxRuntime').optTranslator(new NoopTranslator()).build().loadModel()
try {
    // What the model is for, its threshold and its scale are in the file itself.
    def about = model.getBlock().getCustomMetadata().collectEntries { key, value ->
        [key, key == 'format' ? value : new JsonSlurper().parseText(value)]
    }
    if (about.input != 'uint8' || about.threshold == null)
        throw new IllegalStateException("${file}: a classifier with --input uint8 is needed")
    int size = about.size, patch = about.patch
    if (patch != size)
        throw new IllegalStateException("${file}: was trained on patches of ${patch} px, which " +
                "training resampled to ${size}; use score_detections.groovy")

    def server = getCurrentServer()
    double mpp = server.getPixelCalibration().getAveragedPixelSizeMicrons()
    if (about.mpp != null && !(mpp > 0))
        throw new IllegalStateException('The pixel size is unknown; enter it under Image')
    double downsample = 1
    if (about.mpp != null && Math.abs(mpp / about.mpp - 1) > 0.1)
        downsample = about.mpp / mpp
    int side = Math.max(1, Math.round(size * downsample))

    def readPatch = { double x, double y, ByteBuffer bytes ->
        // The corner as in dataset/slides.py; outside of the slide is white.
        int left = Math.floor(x - side / 2 + 0.5), top = Math.floor(y - side / 2 + 0.5)
        int x0 = Math.max(left, 0), y0 = Math.max(top, 0)
        int x1 = Math.min(left + side, server.getWidth()), y1 = Math.min(top + side, server.getHeight())
        def image = null
        if (x0 < x1 && y0 < y1)
            image = server.readRegion(RegionRequest.createInstance(
                    server.getPath(), downsample, x0, y0, x1 - x0, y1 - y0))
        int dx = Math.round((x0 - left) / downsample), dy = Math.round((y0 - top) / downsample)
        for (int row = 0; row < size; row++) {
            for (int column = 0; column < size; column++) {
                int a = column - dx, b = row - dy, rgb = 0xffffff
                if (image != null && a >= 0 && b >= 0 && a < image.getWidth() && b < image.getHeight())
                    rgb = image.getRGB(a, b)
                bytes.put((byte) (rgb >> 16)).put((byte) (rgb >> 8)).put((byte) rgb)
            }
        }
    }

    def name = 'probability of ' + about.labels[1]
    def detections = getDetectionObjects() as List
    def predictor = model.newPredictor()
    detections.collate(batch).each { cells ->
        def bytes = ByteBuffer.allocateDirect(cells.size() * size * size * 3)
        cells.each {   // at the middle of the bounding box, as classify.py
            def roi = it.getROI()
            readPatch(roi.getBoundsX() + roi.getBoundsWidth() / 2,
                    roi.getBoundsY() + roi.getBoundsHeight() / 2, bytes)
        }
        bytes.rewind()
        def manager = model.getNDManager().newSubManager()
        try {
            def patches = manager.create(bytes, new Shape(cells.size(), size, size, 3), DataType.UINT8)
            patches.setName('patches')
            def output = predictor.predict(new NDList(patches))
            def probability = output.find { it.getName() == 'probability' }.toFloatArray()
            cells.eachWithIndex { cell, i ->
                cell.getMeasurementList().put(name, probability[i] as double)
                int label = probability[i] >= about.threshold.value ? 1 : 0
                cell.setPathClass(getPathClass(about.labels[label]))
            }
        } finally {
            manager.close()
        }
    }
    predictor.close()
    fireHierarchyUpdate()
    println "${detections.size()} detections have a score"
} finally {
    model.close()
}
